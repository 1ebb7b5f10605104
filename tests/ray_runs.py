"""Runs on Ray without a model: engines that answer, wait, fail or die, and a driver to kill."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

from flexmask.choice_scores import ChoiceScore, Score
from flexmask.fusion import Fusion
from flexmask.generation import Generation
from flexmask.inputs.input_files import open_input
from flexmask.ray_data import Predictor
from flexmask.ray_run import Cluster, Hooks, Outcome, run_on_ray
from flexmask.request import Request
from flexmask.results.dataset_run import DatasetJob, GenerationJob, ScoringJob
from flexmask.results.resume import OutputMode
from flexmask.results.run_config import RunConfig
from flexmask.results.shard_queue import Progress
from flexmask.tasks.judge import ChoiceJudge, Judge
from flexmask.tasks.request_source import OnError, PlainRequests, RequestSource

AT_ONCE = 3
"""Rows that these engines start together."""


@dataclass(frozen=True)
class RowEngine:
    """An engine that starts a few rows, does something for each, and answers them.

    Attributes:
        act: Called with each request before it is answered.
    """

    act: Callable[[Request], object]

    def generate(self, requests: Iterable[Request], strategy: Any, **options: Any) -> RowRun:
        return RowRun(requests, self.act, _generated)

    def score(self, requests: Iterable[Request], strategy: Any, **options: Any) -> RowRun:
        return RowRun(requests, self.act, _scored)


@dataclass(frozen=True)
class RowStats:
    """As `flexmask.engine.run_stats.RunStats`, whose package imports torch."""

    generations: int = 0

    def plus(self, other: RowStats) -> RowStats:
        return RowStats(self.generations + other.generations)


class RowRun:
    def __init__(
        self,
        requests: Iterable[Request],
        act: Callable[[Request], object],
        make: Callable[[Request], Any],
    ) -> None:
        self._requests = iter(requests)
        self._act = act
        self._make = make
        self._is_stopped = False
        self.stats = RowStats()

    def stop(self) -> None:
        self._is_stopped = True

    def batches(self) -> Iterator[list[Any]]:
        while not self._is_stopped and (started := list(islice(self._requests, AT_ONCE))):
            for request in started:
                self._act(request)
                self.stats = self.stats.plus(RowStats(1))
                yield [self._make(request)]


def _generated(request: Request) -> Generation:
    return Generation(request, f" {request.uuid}?", (1, 2), "length", 3)


def _scored(request: Request) -> Score:
    """Scores by which the last choice is the most likely."""
    scores = (
        ChoiceScore(text, (1,), (float(n),), False) for n, text in enumerate(request.choices)
    )
    return Score(request, tuple(scores), 3)


def wait(seconds: float, _: Request) -> None:
    time.sleep(seconds)


def die_then_fail_at(uuid: str, folder: Path, request: Request) -> None:
    """Kill the first two workers that come to a row; then fail there, as a GPU does."""
    if request.uuid != uuid:
        return
    deaths = len([*folder.glob("death-*")])
    if deaths < 2:
        (folder / f"death-{deaths}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


class QuickPredictor(Predictor):
    """Answers at once, without a model."""

    def __init__(self) -> None:
        super().__init__(strategy=cast(Any, None))

    def load_engine(self, *_: Any, **__: Any) -> Any:
        return RowEngine(answer)


def load(act: Callable[[Request], object]) -> Any:
    return RowEngine(act)


def open_rows_of(path: str, reads_choices: bool) -> RequestSource:
    make = PlainRequests(reads_choices=reads_choices)
    return RequestSource(open_input(path), make, on_error="skip")


def record() -> RunConfig:
    return RunConfig({"strategy": "causal"}, {"device": "cpu"})


def answer(_: Request) -> None:
    """Do nothing more."""


def job(
    rows: Path,
    act: Callable[[Request], object] = answer,
    on_error: OnError = "skip",
    fusion: Fusion = Fusion(),
    judge: Judge | ChoiceJudge = Judge(),
) -> DatasetJob[Any]:
    scores = isinstance(judge, ChoiceJudge)
    return (ScoringJob if scores else GenerationJob)(
        open_requests=partial(open_rows_of, str(rows), scores),
        make_strategy=partial(getattr, RowEngine, "__name__"),
        load_engine=partial(load, act),
        record=record,
        fusion=fusion,
        judge=judge,
        on_error=on_error,
        options={},
    )


class Heard:
    """The warnings and notes of a run."""

    def __init__(self, stop_at_rows: int | None = None) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.progress: list[Progress] = []
        self._stop_at = stop_at_rows

    def hooks(self) -> Hooks:
        return Hooks(self._progress, self.warnings.append, self.notes.append)

    def _progress(self, progress: Progress, workers: int) -> bool:
        self.progress.append(progress)
        return self._stop_at is not None and progress.rows >= self._stop_at


def run_job(
    job: DatasetJob[Any],
    output: Path,
    mode: OutputMode = "new",
    heard: Heard | None = None,
    address: str | None = None,
) -> Outcome:
    cluster = Cluster(address, workers=2, device="cpu")
    return run_on_ray(job, output, mode, cluster, (heard or Heard()).hooks())


if __name__ == "__main__":  # a driver: ADDRESS, ROWS, OUTPUT, SECONDS per row
    address, rows, output, seconds = sys.argv[1:]
    act = partial(wait, float(seconds))
    run_job(job(Path(rows), act), Path(output), "resume", address=address)
