"""A process that runs jobs within a time limit, and its report."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_jobs import Job, Outcome, OutcomeFile, write_jobs

SHOWN_LINES = 15
"""Last lines of its output that are shown when a process fails."""


@dataclass(frozen=True)
class Report:
    """The end of a process.

    Attributes:
        environment: Its versions and settings; None if it failed before it was ready.
        outcomes: Outcomes by the number of the job; of some jobs only, if it failed.
        total_s: Seconds from its start to its end.
        failure: The reason why it did not run all jobs; None if it did.
    """

    environment: dict[str, Any] | None
    outcomes: dict[int, Outcome]
    total_s: float
    failure: str | None


def run_jobs(
    command: Sequence[str],
    jobs: Sequence[Job],
    folder: Path,
    time_limit_s: float,
    environment: Mapping[str, str],
) -> Report:
    """Run jobs in a process of its own; wait for its end, and end it at the limit.

    Args:
        command: The program; the files of jobs and outcomes are added.
        jobs: The jobs.
        folder: An empty folder, for these files and the program's output.
        time_limit_s: Seconds after which the process is killed, with those that it started.
        environment: Environment variables of the process.
    """
    jobs_file, outcomes, output = folder / "jobs", OutcomeFile(folder / "outcomes"), folder / "out"
    write_jobs(jobs_file, jobs)
    started = time.perf_counter()
    with output.open("w") as file:
        process = subprocess.Popen(
            [*command, str(jobs_file), str(folder / "outcomes")],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(time_limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(process)
    total_s = time.perf_counter() - started
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    failure = None
    if code is None:
        failure = f"ended at its limit of {time_limit_s:.0f} s"
    elif code:
        failure = f"exit status {code}: {lines[-1] if lines else 'no output'}"
    if failure:
        print("\n".join(lines[-SHOWN_LINES:]), file=sys.stderr, flush=True)
    ready, done = outcomes.read()
    return Report(ready, {outcome.number: outcome for outcome in done}, total_s, failure)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it started, so that no GPU memory stays taken."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of them have ended
    finally:
        process.wait()
