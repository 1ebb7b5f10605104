"""Rows and figures of a run on standard output, for programs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flexmask.fusion import Fusion
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.results.result_writer import read_finished_rows
from flexmask.results.row_stream import RowStream
from flexmask.results.schema import SCHEMA
from flexmask.tasks.request_source import BadRow
from quick_cli import COMMAND

REQUESTS = [Request((name,), answers=("yes",), uuid=name) for name in "abcd"]


def generation(request: Request) -> Generation:
    return Generation(request, " yes", (1, 2), "eos", 3)


def uuids(lines: list[str]) -> list[str]:
    return [json.loads(line)["uuid"] for line in lines]


def test_rows_come_in_input_order_as_soon_as_those_before_them_are_there() -> None:
    lines: list[str] = []
    requests: list[Request | BadRow] = [
        *REQUESTS[:2],
        BadRow("bad", "no segments"),
        *REQUESTS[2:],
    ]
    stream = RowStream(lines.append, requests=requests)
    assert lines == []
    assert [request.uuid for request in stream.remaining] == list("abcd")
    stream.write(map(generation, REQUESTS[1:3]))
    assert lines == []
    stream.write([generation(REQUESTS[0])])
    assert uuids(lines) == ["a", "b", "bad", "c"]
    assert not stream.is_complete
    stream.write([BadRow("d", "too long", REQUESTS[3])])
    assert uuids(lines) == ["a", "b", "bad", "c", "d"]
    assert stream.is_complete
    assert (stream.summary.rows, stream.summary.correct, stream.summary.failed) == (5, 3, 2)
    assert all(json.loads(line).keys() == set(SCHEMA.names) for line in lines)


def test_a_fusion_that_runs_each_segment_has_a_row_for_each() -> None:
    lines: list[str] = []
    request = Request(("one", "two"), uuid="a")
    stream = RowStream(lines.append, requests=[request], fusion=Fusion("each"))
    stream.write(map(generation, reversed(list(stream.remaining))))
    assert [json.loads(line)["segment"] for line in lines] == [1, 2]
    assert stream.fusion == Fusion()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    contents = [{"uuid": n, "segments": ["Q: \x1b[31m", "é"], "answers": ["où\x7f"]} for n in "ab"]
    path.write_text("".join(json.dumps(row) + "\n" for row in contents))
    return path


def generate(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "generate", "--device", "cpu", *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_json_lines_go_to_standard_output_and_nothing_else(rows: Path) -> None:
    result = generate("-i", rows, "-o", "-", "-v", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["uuid"], second["uuid"]) == ("a", "b")
    assert first["prediction"] == "où\x7f"
    assert result.stdout.replace("\n", "").isprintable()
    assert "model: " in result.stderr
    assert [path.name for path in rows.parent.iterdir()] == ["rows.jsonl"]


def test_standard_input_to_standard_output_is_a_filter(rows: Path) -> None:
    command = [*COMMAND, "generate", "--device", "cpu", "-i", "-", "-o", "-", "-q"]
    with rows.open() as file:
        result = subprocess.run(command, stdin=file, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert uuids(result.stdout.splitlines()) == ["a", "b"]


def test_a_reader_who_has_gone_ends_the_run_quietly(rows: Path) -> None:
    command = " ".join([*COMMAND, "generate", "--device", "cpu", "-i", str(rows), "-o", "-"])
    result = subprocess.run(
        ["bash", "-c", f"({command}; echo $? >status) | true"],
        cwd=rows.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stderr == ""
    assert (rows.parent / "status").read_text() == "1\n"


def test_the_outcome_of_a_run_is_printed_as_json(rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.feather"
    result = generate("-i", rows, "-o", output, "--json", "--quiet")
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout)
    assert outcome["output"] == str(output)
    assert (outcome["rows"], outcome["judged"], outcome["correct"]) == (2, 2, 2)
    assert outcome["metrics"] == {"exact": {"mean": 1.0, "low": 1.0, "high": 1.0}}
    assert outcome["run"]["tokens_per_s"] == 0
    assert read_finished_rows(output).num_rows == 2
    again = json.loads(generate("-i", rows, "-o", output, "--json", "--resume").stdout)
    assert (again["rows"], again["resumed"], again["run"]) == (2, 2, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "-", "--resume"], "standard output holds no rows; leave out --resume and --over"),
        (["-o", "-", "--overwrite"], "standard output holds no rows"),
        (["-o", "-", "--json"], "--json and --output - both print to standard output"),
        (["--dry-run", "--json"], "--dry-run prints prompts; leave out --json"),
    ],
)
def test_what_excludes_each_other_is_refused(arguments: list[str], message: str) -> None:
    result = generate(*arguments)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {message}")
