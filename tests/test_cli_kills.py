"""``flexmask generate`` on the bundled model, killed and resumed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pytest

from flexmask.results.result_writer import read_finished_rows

COMMAND = [sys.executable, "-m", "flexmask_cli", "generate", "--device", "cpu", "--quiet"]
COMMAND += ["--batch-size", "2", "--max-new-tokens", "6", "--resume"]


def run_whole(output: Path, limit: int) -> None:
    command = [*COMMAND, "--limit", str(limit), "--output", str(output)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == ""


def run_and_kill(output: Path, limit: int, is_time: Callable[[float], bool]) -> bool:
    """Whether it lived until it was time to be killed."""
    started = time.monotonic()
    with subprocess.Popen([*COMMAND, "--limit", str(limit), "--output", output]) as process:
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
    row_of = {row["uuid"]: row for row in whole.to_pylist()}
    for row in found.to_pylist():
        assert row == row_of.pop(row["uuid"])


def test_a_run_killed_between_its_rows_equals_an_undisturbed_one(tmp_path: Path) -> None:
    limit = 12
    run_whole(tmp_path / "whole.feather", limit)
    whole = pyarrow.feather.read_table(tmp_path / "whole.feather")
    output = tmp_path / "killed.feather"
    for rows in (4, 8):

        def has_rows(_: float, wanted: int = rows) -> bool:
            return finished_rows(output, whole).num_rows >= wanted

        assert run_and_kill(output, limit, has_rows)
        found = finished_rows(output, whole)
        assert rows <= found.num_rows < limit
        check_rows(found, whole)
    run_whole(output, limit)
    assert pyarrow.feather.read_table(output).equals(whole)


@pytest.mark.long
def test_a_run_killed_at_twenty_random_moments_equals_an_undisturbed_one(tmp_path: Path) -> None:
    limit = 100
    started = time.monotonic()
    run_whole(tmp_path / "whole.feather", limit)
    duration_s = time.monotonic() - started
    whole = pyarrow.feather.read_table(tmp_path / "whole.feather")
    assert whole.num_rows == limit

    generator = random.Random(0)
    rounds = 1
    output = tmp_path / "killed-1.feather"
    found: list[int] = []
    while len(found) < 20:
        life_s = generator.uniform(0.1, 0.95) * duration_s
        if run_and_kill(output, limit, lambda age_s, life_s=life_s: age_s >= life_s):
            rows = finished_rows(output, whole)
            found.append(rows.num_rows)
            check_rows(rows, whole)
        if output.exists():
            assert pyarrow.feather.read_table(output).equals(whole)
            rounds += 1
            output = tmp_path / f"killed-{rounds}.feather"
    run_whole(output, limit)
    assert pyarrow.feather.read_table(output).equals(whole)
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("*.tmp"))
    print(f"20 kills in {rounds} rounds of {duration_s:.0f} s; rows found: {found}")
