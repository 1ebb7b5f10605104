"""Where output goes when nobody reads it, and what text of others does to a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexmask.printable import LINES, WORDS, printable
from flexmask.results.result_writer import read_finished_rows
from flexmask_cli.app import main
from quick_cli import COMMAND

FLEXMASK = " ".join(COMMAND)
OPTIONS = "--device cpu --limit 1 --batch-size 1 --max-new-tokens 2 --output out.feather"
ATTACK = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202eevil"


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("ending", "status", "message"),
    [
        ("| head -1", 0, ""),
        ("| true", 0, ""),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        ("2>&1 | true", 0, ""),
        (
            "> /dev/full",
            1,
            "error: standard output cannot be written (No space left on device); "
            "send it elsewhere\n",
        ),
        ("2> /dev/full >&2", 1, ""),
    ],
)
def test_a_stream_that_nobody_reads_costs_no_result(
    tmp_path: Path, ending: str, status: int, message: str
) -> None:
    result = shell(f"{FLEXMASK} generate -v {OPTIONS} {ending}", tmp_path)
    said = [line for line in result.stderr.splitlines(True) if line.startswith(("error", "Trac"))]
    assert ("".join(said), result.returncode) == (message, status)
    assert read_finished_rows(tmp_path / "out.feather").num_rows == 1
    assert os.listdir(tmp_path) == ["out.feather"]


def test_a_reader_who_has_gone_ends_the_command_quietly(tmp_path: Path) -> None:
    result = shell(f"({FLEXMASK} strategies; echo $? >status) | true", tmp_path)
    assert result.stderr == ""
    assert (tmp_path / "status").read_text() == "1\n"


def test_no_file_gets_the_number_of_a_stream_that_is_closed(tmp_path: Path) -> None:
    """The journal would, and what a plugin prints would go into it."""
    program = "import os; from flexmask_cli.streams import prepared_streams\n"
    program += "with prepared_streams():\n"
    program += "    print('lost'); fd = os.open('file', os.O_CREAT | os.O_WRONLY)\n"
    program += "    os.write(fd, str(fd).encode())"
    (tmp_path / "program.py").write_text(program)
    result = shell(f"{sys.executable} program.py <&- >&- 2>&-", tmp_path)
    assert result.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, 東京, 😀", "plain, é, 東京, 😀"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\bc\x7f", "a\\rb\\x08c\\x7f"),
        ("\x9b2J\x85", "\\x9b2J\\x85"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u2066x\u2069\u2028", "\\u2066x\\u2069\\u2028"),
        ("o\udcff.jsonl", "o\\udcff.jsonl"),
        ("\u3000👩\u200d💻\xa0", "\u3000👩\u200d💻\xa0"),
        ("two\nlines\t", "two\\nlines\\t"),
    ],
)
def test_what_would_command_a_terminal_shows_as_an_escape(text: str, shown: str) -> None:
    assert printable(text, WORDS) == shown
    assert printable(text, LINES) == shown.replace("\\n", "\n").replace("\\t", "\t")
    assert printable(printable(text, WORDS), WORDS) == shown


def harmless(*streams: str) -> bool:
    return all(printable(text, LINES) == text for text in streams)


@pytest.fixture
def attacked(tmp_path: Path) -> Path:
    """Rows in which every text is an attack."""
    row = {
        "uuid": ATTACK,
        "prefix": ATTACK,
        "segments": [f"Q: {ATTACK}", f"Q: two {ATTACK}"],
        "suffix": f"{ATTACK}\nA:",
        "answers": [ATTACK],
    }
    path = tmp_path / f"rows{ATTACK}.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({"uuid": ATTACK + "2"}) + "\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["generate", "--dry-run", "--limit", "1", "--input"], 0),
        (["generate", "--dry-run", "--on-error", "skip", "--input"], 0),
        (["generate", "--dry-run", "--input"], 1),
        (["eval"], 1),
        (["show", "-s", "causal", "--ascii", "--row", "2"], 1),
        (["generate", "--strategy", ATTACK, "--input"], 1),
        (["generate", "--param", ATTACK, "--input"], 1),
    ],
)
def test_no_text_of_a_row_or_a_name_reaches_the_terminal_as_it_is(
    attacked: Path, arguments: list[str], status: int
) -> None:
    command = [*COMMAND, *arguments, str(attacked)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stderr
    assert harmless(result.stdout, result.stderr)
    assert "\\x1b" in result.stdout + result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [ATTACK],
        [f"--{ATTACK}"],
        ["generate", f"--{ATTACK}"],
        ["generate", "--on-error", ATTACK],
        ["generate", "--seed", ATTACK],
        ["generate", f"--quiet={ATTACK}"],
        ["show", "a", ATTACK],
        ["tasks", "\udcff\x1b"],
    ],
    ids=ascii,
)
def test_no_mistake_in_the_use_of_a_command_reaches_the_terminal_as_it_is(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["flexmask", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    streams = capsys.readouterr()
    assert harmless(*streams)
    assert "Error: " in streams.err


def test_answers_and_questions_are_harmless_when_a_run_prints_them(attacked: Path) -> None:
    output = attacked.with_name(f"out{ATTACK}.feather")
    command = [*COMMAND, "generate", *OPTIONS.split()[:-2]]
    command += ["--input", str(attacked), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert harmless(result.stdout, result.stderr)
    for arguments in (["eval", output], ["show", output], ["eval", "--json", output]):
        command = [*COMMAND, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert harmless(result.stdout, result.stderr)
        assert "x1b" in result.stdout or "u001b" in result.stdout


def test_messages_of_plugins_are_harmless(
    site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    site.install("flexmask-mine", f"print({ATTACK!r})\nraise ValueError({ATTACK!r})")
    for command in ("plugins", "strategies"):
        monkeypatch.setattr(sys, "argv", ["flexmask", command])
        with pytest.raises(SystemExit):
            main()
        streams = capfd.readouterr()
        assert harmless(*streams)
        assert "\\x1b" in (streams.out if command == "plugins" else streams.err)
