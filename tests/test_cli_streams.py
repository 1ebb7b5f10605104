"""Standard streams that are closed, full, or of an encoding that lacks characters."""

import json
import os
import subprocess
import sys

import pyarrow.feather
import pytest

COMMAND = [sys.executable, "-m", "flexmask_cli"]
GENERATE = ["--device", "cpu", "--strategy", "causal", "--max-new-tokens", "2", "--limit", "2"]
NEEDS_FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def run(*arguments, redirected="", **environment):
    """A command under a shell that redirects its streams."""
    command = ["sh", "-c", f'"$@" {redirected}', "sh", *COMMAND, *map(str, arguments)]
    environment = os.environ | {"PYTHONUNBUFFERED": ""} | environment
    return subprocess.run(command, capture_output=True, env=environment, check=False)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"segments": ["Q: où 東京?"], "answers": ["東京"]}) + "\n")
    return path


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_an_encoding_lacks_is_printed_as_its_escape(rows, encoding):
    result = run("generate", "--input", rows, "--dry-run", PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    assert "Q: où 東京?".encode(encoding, "backslashreplace") in result.stdout


def test_rows_on_standard_input_are_utf_8_whatever_the_terminal_is(rows):
    redirected = f"<{rows}"
    printed = [
        run("generate", "-i", "-", "--dry-run", redirected=redirected, PYTHONIOENCODING=it).stdout
        for it in ("utf-8", "cp1252")
    ]
    assert "東京".encode() in printed[0]
    assert printed[0].decode().encode("cp1252", "backslashreplace") == printed[1]


def test_a_closed_standard_input_is_one_line():
    result = run("generate", "--input", "-", "--dry-run", redirected="<&-")
    assert result.returncode == 1
    assert result.stderr.decode().splitlines() == [
        "error: standard input: it is closed; pipe rows into it, or name a file"
    ]


@NEEDS_FULL
@pytest.mark.parametrize(
    "arguments", [["generate", "--dry-run", "-n", "1"], ["strategies"], ["tasks", "--json"]]
)
def test_a_full_standard_output_is_one_line(arguments):
    result = run(*arguments, redirected=">/dev/full")
    assert result.returncode == 1
    assert result.stderr.decode().splitlines() == [
        "error: standard output cannot be written (No space left on device); send it elsewhere"
    ]


def test_a_reader_that_has_gone_is_no_traceback():
    result = run("strategies", "--json", redirected="| head -c 1 >/dev/null")
    assert b"Traceback" not in result.stderr
    assert b"Exception" not in result.stderr


@NEEDS_FULL
@pytest.mark.parametrize(
    ("redirected", "status"),
    [(">/dev/full", 1), ("2>/dev/full", 0), (">&- 2>&- <&-", 0), ("| true", None)],
)
def test_a_run_loses_no_row_to_what_cannot_be_printed(tmp_path, redirected, status):
    output = tmp_path / "out.feather"
    result = run("generate", *GENERATE, "--output", output, redirected=redirected)
    assert pyarrow.feather.read_table(output).num_rows == 2
    assert b"Traceback" not in result.stderr
    if status is not None:
        assert result.returncode == status


def test_an_output_whose_name_is_not_utf_8_is_refused_before_the_run(tmp_path):
    result = run("generate", *GENERATE, "--output", os.fsdecode(b"o\xff.jsonl"))
    assert result.returncode == 1
    assert result.stderr.decode().splitlines() == [
        "error: --output o\\udcff.jsonl: its name is not UTF-8; choose another"
    ]


def test_an_input_whose_name_is_not_utf_8_gives_rows_that_can_be_written(tmp_path, rows):
    odd = os.fsencode(tmp_path) + b"/\xff.jsonl"
    rows.write_text(rows.read_text() + "{broken\n")
    os.rename(rows, odd)
    output = tmp_path / "out.feather"
    options = [*GENERATE, "--on-error", "skip", "--output", output, "--input", os.fsdecode(odd)]
    result = run("generate", *options)
    assert result.returncode == 0, result.stderr
    good, bad = pyarrow.feather.read_table(output).to_pylist()
    assert good["error"] is None
    assert "\\udcff.jsonl:2: not JSON" in bad["error"]
