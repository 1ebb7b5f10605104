"""Measures rows per second of ``generate --engine ray`` on 1 to N workers, in one run.

The requests are repeated, under new uuids, until there are enough rows. For each number of
workers the data set is run from its input to its merged file. The rate is that of the time in
which all workers compute: from the first look at the progress at which each has written rows (so
model and compiled code are loaded) until the last row is written. The wait of workers for the last
shards of others is part of it; loading and merging are given apart. The first run fills torch's
compile cache and is not reported. The efficiency of n workers is their rate over n times that of
the smallest number.

Weights are random unless ``--shape bundled``, the model that comes with flexmask.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch

from flexmask import Engine, Fusion, Strategy
from flexmask.demo import model_path, questions_path
from flexmask.plugins.registry import make_strategy
from flexmask.ray_run import Cluster, Hooks, connected, run_on_ray
from flexmask.results.dataset_run import GenerationJob
from flexmask.results.run_config import RunConfig
from flexmask.results.shard_queue import Progress
from flexmask.tasks.judge import Judge
from flexmask.tasks.request_source import RequestSource, read_requests
from random_model import DTYPES, SHAPES, random_engine
from stamp import environment_stamp

BUNDLED = "bundled"


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement.

    Attributes:
        requests: File of requests.
        rows: Rows of the data set.
        workers: Numbers of workers, in the order in which they run.
        shape: One of `SHAPES`, or ``bundled``.
        strategy: Name of the mask strategy.
        max_new_tokens: Most tokens per row.
        batch_size: Rows that run together; None to choose by memory.
        device: ``cuda`` or ``cpu``.
        address: Address of the cluster; None for one of this machine.
        folder: Folder for input and output, which all machines share; None for a temporary one.
    """

    requests: str
    rows: int
    workers: Sequence[int]
    shape: str
    strategy: str
    max_new_tokens: int
    batch_size: int | None
    device: str
    address: str | None
    folder: str | None


@dataclass(frozen=True)
class Rate:
    """The result for one number of workers.

    Attributes:
        workers: Number of workers.
        rows_per_s: Rows per second while all workers computed.
        tokens_per_s: Generated tokens per second in that time.
        efficiency: Rows per second over those of the fewest workers, per worker.
        measured_rows: Rows written in that time.
        start_s: Seconds until each worker had written rows: loading and the first batches.
        run_s: Seconds from then until the last row.
        end_s: Seconds from then until the merged file was there.
        shards: Number of shards.
    """

    workers: int
    rows_per_s: float
    tokens_per_s: float
    efficiency: float
    measured_rows: int
    start_s: float
    run_s: float
    end_s: float
    shards: int


class Watch:
    """Notes the progress of a run with the time of each look."""

    def __init__(self) -> None:
        """Start the clock."""
        self.started = time.perf_counter()
        self.looks: list[tuple[float, Progress]] = []

    def __call__(self, progress: Progress, workers: int) -> bool:
        """Note a look; the run goes on."""
        self.looks.append((time.perf_counter() - self.started, progress))
        return False

    def rate(self, workers: int, total_s: float, alone: Rate | None) -> Rate:
        """Return the rate of a run that took ``total_s`` seconds.

        Args:
            workers: Number of workers.
            total_s: Seconds of the whole run.
            alone: The rate of the fewest workers; None if it is this one.

        Raises:
            SystemExit: If the run was over before all workers computed at the same time.
        """
        last = self.looks[-1][1]
        begin = next((look for look in self.looks if look[1].workers_with_rows >= workers), None)
        if begin is None or begin[1].rows >= last.rows:
            raise SystemExit(f"{workers} workers: too few rows to measure; pass more --rows")
        end_at = next(at for at, progress in self.looks if progress.rows == last.rows)
        rows, seconds = last.rows - begin[1].rows, end_at - begin[0]
        per_s = rows / seconds
        base = per_s / workers if alone is None else alone.rows_per_s / alone.workers
        return Rate(
            workers=workers,
            rows_per_s=per_s,
            tokens_per_s=(last.tokens - begin[1].tokens) / seconds,
            efficiency=per_s / workers / base,
            measured_rows=rows,
            start_s=begin[0],
            run_s=seconds,
            end_s=total_s - end_at,
            shards=last.shards,
        )


def load_engine(shape: str, device: str) -> Engine:
    """Load the engine of a worker."""
    if shape == BUNDLED:
        return Engine.from_pretrained(str(model_path()), device=device)
    return random_engine(shape, device, DTYPES[device])


def open_requests(path: str) -> RequestSource:
    """Open the repeated requests."""
    from flexmask.inputs.input_files import open_input

    return RequestSource(open_input(path))


def record(settings: Settings) -> RunConfig:
    """Return what a result file records of a run."""
    return RunConfig({"strategy": settings.strategy, "shape": settings.shape})


def make_job(settings: Settings, rows: Path) -> GenerationJob:
    """Return the run over the repeated requests."""
    make: partial[Strategy] = partial(make_strategy, settings.strategy, {})
    return GenerationJob(
        open_requests=partial(open_requests, str(rows)),
        make_strategy=make,
        load_engine=partial(load_engine, settings.shape, settings.device),
        record=partial(record, settings),
        fusion=Fusion(),
        judge=Judge(),
        on_error="stop",
        options={"max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size},
    )


def write_repeated(settings: Settings, path: Path) -> None:
    """Write the requests again and again, with uuids of their own."""
    requests = read_requests(settings.requests)
    with path.open("w", encoding="utf-8") as file:
        for number, request in enumerate(islice(cycle(requests), settings.rows)):
            row = {
                "uuid": str(number),
                "prefix": request.prefix,
                "segments": request.segments,
                "suffix": request.suffix,
            }
            file.write(json.dumps(row) + "\n")


def measure(settings: Settings, folder: Path) -> list[Rate]:
    """Run the data set with each number of workers; the first number twice."""
    path = folder / "scaling.jsonl"
    write_repeated(settings, path)
    rates: list[Rate] = []
    for is_reported, workers in [
        (False, settings.workers[0]),
        *((True, n) for n in settings.workers),
    ]:
        watch = Watch()
        cluster = Cluster(settings.address, workers, settings.device)
        hooks = Hooks(progress=watch, warn=print, note=lambda _: None)
        output = folder / "scaling.feather"
        run_on_ray(make_job(settings, path), output, "overwrite", cluster, hooks)
        total_s = time.perf_counter() - watch.started
        if is_reported:
            rates.append(watch.rate(workers, total_s, rates[0] if rates else None))
    return rates


def main() -> None:
    """Print a table, then a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", default=str(questions_path()))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", choices=(*SHAPES, BUNDLED), default="llama-3.2-3b")
    parser.add_argument("--strategy", default="ensemble_isolation")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--address", help="of a Ray cluster; default: this machine")
    parser.add_argument("--folder", help="shared by all machines; default: a temporary one")
    parser.add_argument("--output", type=Path, help="file for the JSON, beside the print")
    arguments = vars(parser.parse_args())
    output: Path | None = arguments.pop("output")
    settings = Settings(**arguments)
    with connected(settings.address), TemporaryDirectory(dir=settings.folder) as folder:
        resources: dict[str, Any] = {
            name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU")
        }
        rates = measure(settings, Path(folder))
    print(f"{'workers':>8}{'rows/s':>12}{'tokens/s':>12}{'efficiency':>12}{'start s':>10}")
    for rate in rates:
        print(
            f"{rate.workers:8}{rate.rows_per_s:12.2f}{rate.tokens_per_s:12.0f}"
            f"{rate.efficiency:12.3f}{rate.start_s:10.1f}"
        )
    line = json.dumps(
        {
            "rates": [asdict(rate) for rate in rates],
            "settings": asdict(settings),
            "cluster": resources,
            "environment": environment_stamp(),
        }
    )
    print(line)
    if output is not None:
        output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
