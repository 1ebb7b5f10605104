"""Files that may not grow beyond a size, as on a full disk. Run as a program, it fills them.

A limit of the process (``RLIMIT_FSIZE``) holds for root too, and needs no disk of its own.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import flexmask
from flexmask.errors import OutputError
from flexmask.results.formats import EXTENSIONS
from flexmask.results.result_writer import ResultWriter, read_finished_rows
from result_runs import CONFIG, answer, journal_of, make_requests, run

ROWS = 8
LARGEST_BYTES = 20_000
"""More than the journal and every format need for these rows."""


def fill(folder: Path, extension: str, count: int) -> None:
    """Run under ``count`` limits, each in a process of its own; print how many were reached."""
    requests = make_requests(ROWS)
    undisturbed = folder / f"undisturbed{extension}"
    run(undisturbed, requests)
    expected = read_finished_rows(undisturbed).to_pylist()
    reached = 0
    for number in range(count):
        limit = number * LARGEST_BYTES // (count - 1)
        output = folder / str(number) / f"out{extension}"
        child = os.fork()
        if not child:
            os._exit(write_under(limit, output))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 1), f"limit of {limit} bytes: status {status}"
        reached += status
        check(output, expected, is_full=bool(status))
    print(reached)


def write_under(limit: int, output: Path) -> int:
    """Write all rows; 1 if that fails as it should, 2 if otherwise."""
    log = os.open(output.parent.with_suffix(".written"), os.O_CREAT | os.O_WRONLY)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with ResultWriter.open(output, config=CONFIG, requests=make_requests(ROWS)) as writer:
            for request in writer.remaining:
                writer.write([answer(request)])
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                os.write(log, f"{request.uuid}\n".encode())
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    except OutputError as error:
        is_told = "File too large" in str(error) and "\n" not in str(error)
        return 1 if is_told else 2
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 2
    return 0


def check(output: Path, expected: list[dict[str, object]], *, is_full: bool) -> None:
    """No file is half written, no row is lost whose writing was over, and the rest is resumed."""
    assert output.exists() != is_full
    kept = []
    if journal_of(output).exists():
        kept = read_finished_rows(journal_of(output)).to_pylist()
    if is_full:
        assert all(row in expected for row in kept)
        written = output.parent.with_suffix(".written").read_text().split()
        assert {row["uuid"] for row in kept} >= set(written)
        assert not list(output.parent.glob("*.tmp"))
    run(output, make_requests(ROWS), mode="resume")
    assert read_finished_rows(output).to_pylist() == expected
    beside = {output.with_suffix(".run.json").name} if output.suffix == ".jsonl" else set()
    assert set(os.listdir(output.parent)) == {output.name} | beside


def as_program(folder: Path, extension: str, count: int) -> int:
    """How many of the limits were reached."""
    search_path = str(Path(flexmask.__file__).parents[1])
    finished = subprocess.run(
        [sys.executable, __file__, str(folder), extension, str(count)],
        env={**os.environ, "PYTHONPATH": search_path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(finished.stdout)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_disk_that_is_full_after_so_many_bytes_costs_no_finished_row(
    tmp_path: Path, extension: str, record_property: Callable[[str, object], None]
) -> None:
    reached = as_program(tmp_path, extension, 7)
    record_property("cases", reached)
    assert 3 <= reached < 7


@pytest.mark.long
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_no_size_of_a_disk_costs_a_finished_row(
    tmp_path: Path, extension: str, record_property: Callable[[str, object], None]
) -> None:
    reached = as_program(tmp_path, extension, 120)
    record_property("cases", reached)
    print(f"{reached} of 120 disks were full")
    assert reached >= 33


if __name__ == "__main__":
    fill(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
