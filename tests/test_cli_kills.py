"""``flexmask generate`` and ``flexmask score`` on the bundled model, killed and resumed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pytest

from command import run_command
from flexmask.demo import questions_path
from flexmask.results.result_writer import read_finished_rows
from flexmask.results.schema import key_of
from quick_cli import COMMAND as WITHOUT_MODEL

GENERATE = ["generate", "--batch-size", "2", "--max-new-tokens", "6"]
SHARED = ["--device", "cpu", "--quiet", "--resume"]

ROWS_WITHOUT_MODEL = 400
"""So many that the result file takes some time to write."""


def run_whole(command: Sequence[str], output: Path) -> None:
    finished = run_command(*command, *SHARED, "--output", output)
    assert finished.status == 0, finished.err
    assert finished.out == ""


def run_and_kill(command: Sequence[str], output: Path, is_time: Callable[[float], bool]) -> bool:
    """Whether it lived until it was time to be killed."""
    started = time.monotonic()
    flexmask = [sys.executable, "-m", "flexmask_cli", *command, *SHARED]
    with subprocess.Popen([*flexmask, "--output", output]) as process:
        while process.poll() is None:
            if is_time(time.monotonic() - started):
                process.kill()
                return True
            time.sleep(0.005)
    assert process.returncode == 0
    return False


def finished_rows(output: Path, whole: pa.Table) -> pa.Table:
    """What stands in the journal."""
    journal = output.with_name(output.name + ".partial")
    is_there = journal.exists() and journal.stat().st_size > 0
    return read_finished_rows(journal) if is_there else whole.slice(0, 0)


def check_rows(found: pa.Table, whole: pa.Table) -> None:
    """Batches are written as they finish: in any order, but with the values of the whole."""
    row_of = {key_of(row): row for row in whole.to_pylist()}
    for row in found.to_pylist():
        assert row == row_of.pop(key_of(row))


def check_kills(command: Sequence[str], kills: Sequence[int], folder: Path) -> pa.Table:
    """Kill a run each time that it has so many rows; resumed, it equals an undisturbed one."""
    run_whole(command, folder / "whole.feather")
    whole = pyarrow.feather.read_table(folder / "whole.feather")
    output = folder / "killed.feather"
    for rows in kills:

        def has_rows(_: float, wanted: int = rows) -> bool:
            return finished_rows(output, whole).num_rows >= wanted

        assert run_and_kill(command, output, has_rows)
        found = finished_rows(output, whole)
        assert rows <= found.num_rows < whole.num_rows
        check_rows(found, whole)
    run_whole(command, output)
    assert pyarrow.feather.read_table(output).equals(whole)
    return whole


def test_a_run_killed_between_its_rows_equals_an_undisturbed_one(tmp_path: Path) -> None:
    check_kills([*GENERATE, "--limit", "12"], (4, 8), tmp_path)


def test_a_run_killed_between_samples_equals_an_undisturbed_one(tmp_path: Path) -> None:
    sampled = ["--limit", "6", "--samples", "3", "--temperature", "2.5"]
    whole = check_kills([*GENERATE, *sampled], (7,), tmp_path)
    assert whole["sample"].to_pylist() == [0, 1, 2] * 6
    assert len(set(whole["generation"].to_pylist())) > 6


def test_scores_of_a_killed_run_equal_those_of_an_undisturbed_one(tmp_path: Path) -> None:
    questions = [json.loads(line) for line in questions_path().read_text().splitlines()]
    answers = [row["answers"][0] for row in questions]
    path = tmp_path / "choices.jsonl"
    with path.open("w") as file:
        for number, row in enumerate(questions):
            wrong = answers[number - 1]
            row |= {"prefix": "", "choices": [f" {answers[number]}", f" {wrong}"], "answer": 0}
            file.write(json.dumps(row) + "\n")
    # One prompt at a time: what else is in a batch changes the last digits.
    whole = check_kills(["score", "--batch-size", "1", "--input", str(path)], (7,), tmp_path)
    assert whole["correct"].to_pylist().count(True) > whole.num_rows / 2


@pytest.mark.long
def test_a_run_killed_at_twenty_random_moments_equals_an_undisturbed_one(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("cases", 20)
    limit = 100
    command = [*GENERATE, "--limit", str(limit)]
    started = time.monotonic()
    run_whole(command, tmp_path / "whole.feather")
    duration_s = time.monotonic() - started
    whole = pyarrow.feather.read_table(tmp_path / "whole.feather")
    assert whole.num_rows == limit

    generator = random.Random(0)
    rounds = 1
    output = tmp_path / "killed-1.feather"
    found: list[int] = []
    while len(found) < 20:
        life_s = generator.uniform(0.1, 0.95) * duration_s

        def is_over(age_s: float, life_s: float = life_s) -> bool:
            return age_s >= life_s

        if run_and_kill(command, output, is_over):
            rows = finished_rows(output, whole)
            found.append(rows.num_rows)
            check_rows(rows, whole)
        if output.exists():
            assert pyarrow.feather.read_table(output).equals(whole)
            rounds += 1
            output = tmp_path / f"killed-{rounds}.feather"
    run_whole(command, output)
    assert pyarrow.feather.read_table(output).equals(whole)
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("*.tmp"))
    print(f"20 kills in {rounds} rounds of {duration_s:.0f} s; rows found: {found}")


@pytest.mark.long
def test_a_run_killed_at_24_moments_of_its_last_write_loses_no_row(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("cases", count := 24)
    rows = [{"uuid": str(n), "segments": ["x"] * 20} for n in range(ROWS_WITHOUT_MODEL)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    duration_s = duration_of_last_write(tmp_path / "whole.feather")
    whole = pyarrow.feather.read_table(tmp_path / "whole.feather")
    found: list[str] = []
    while len(found) < count:
        output = tmp_path / f"{len(found)}.feather"
        if not kill_in_last_write(output, duration_s * len(found) / count):
            duration_s *= 0.8  # it was quicker this time
            output.unlink()
            continue
        left = [path for path in (output, journal_of(output)) if path.exists()]
        assert left
        for path in left:
            assert read_finished_rows(path).num_rows == ROWS_WITHOUT_MODEL
        found.append(" and ".join(path.suffix for path in left))
        resumed = start_without_model(output)
        assert resumed.wait() == 0
        assert pyarrow.feather.read_table(output).equals(whole)
        assert sorted(tmp_path.glob(f"{output.name}*")) == [output]
    print(f"{count} kills in a last write of {1e3 * duration_s:.0f} ms; left: {Counter(found)}")


def start_without_model(output: Path) -> subprocess.Popen[bytes]:
    """Start a run whose engine answers at once."""
    command = [*WITHOUT_MODEL, "generate", "--device", "cpu", "--quiet", "--resume"]
    command += ["--input", str(output.with_name("rows.jsonl")), "--output", str(output)]
    return subprocess.Popen(command)


def journal_of(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def wait_for_last_write(process: subprocess.Popen[bytes], output: Path) -> bool:
    """Whether it came: the file that becomes the result is there, after rows in the journal."""
    temporary, rows = output.with_name(output.name + ".tmp"), 100 * ROWS_WITHOUT_MODEL
    while process.poll() is None:
        with suppress(FileNotFoundError):
            # A journal begins as a temporary file too.
            if temporary.exists() and journal_of(output).stat().st_size > rows:
                return True
    return False


def duration_of_last_write(output: Path) -> float:
    """Seconds from there until the journal of a whole run is gone."""
    with start_without_model(output) as process:
        assert wait_for_last_write(process, output)
        started = time.monotonic()
        while journal_of(output).exists():
            assert process.poll() in (None, 0)
        duration_s = time.monotonic() - started
    assert process.returncode == 0
    return duration_s


def kill_in_last_write(output: Path, after_s: float) -> bool:
    """Kill a run some time after its last write began; False if it ended before."""
    with start_without_model(output) as process:
        if not wait_for_last_write(process, output):
            return False
        started = time.monotonic()
        while time.monotonic() - started < after_s:
            pass
        process.kill()
    return process.returncode < 0
