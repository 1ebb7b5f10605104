"""Runs jobs with flexmask: ``python run_flexmask.py SHAPE DEVICE JOBS OUTCOMES``.

``vllm_peer.py`` starts this program. Before the model takes memory, it measures the rates of the
machine that floors are computed from.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from flexmask import Engine, Request
from flexmask.bench.floors import Rates
from peer_jobs import Job, Outcome, OutcomeFile, read_jobs
from random_model import DTYPES, random_engine
from stamp import environment_stamp
from timed_run import Way, timed_run


def run(engine: Engine, job: Job) -> Outcome:
    """Time every run of a job."""
    way, seconds = Way.named(job.way), []
    for fields in job.runs:
        requests = [Request(**each) for each in fields]
        total_s, stats = timed_run(engine, requests, way, max_new_tokens=job.new_tokens)
        seconds.append(total_s)
    first_s, *others = seconds
    counts: dict[str, Any] = asdict(stats)
    return Outcome(
        job.number, first_s, tuple(others), stats.prompt_tokens, stats.computed_tokens, counts
    )


def main(shape: str, device: str, jobs: list[Job], outcomes: OutcomeFile) -> None:
    """Measure the machine, make the model, and run the jobs one after another."""
    rates = Rates.measure(torch.device(device), DTYPES[device])
    started = time.perf_counter()
    engine = random_engine(shape, device, DTYPES[device])
    start_s = time.perf_counter() - started
    outcomes.write(environment_stamp() | {"rates": asdict(rates), "start_s": start_s})
    for _, of_one_way in groupby(jobs, key=lambda job: job.way):
        for job in of_one_way:
            outcomes.write(run(engine, job))
        engine.release()
        gc.collect()


if __name__ == "__main__":
    shape, device, *files = sys.argv[1:]
    jobs, outcomes = map(Path, files)
    main(shape, device, read_jobs(jobs), OutcomeFile(outcomes))
