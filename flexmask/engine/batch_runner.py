"""Runs a batch in two halves, between which the host is free while a GPU computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from flexmask.engine.decode_loop import DecodeLoop
from flexmask.engine.device_clock import DeviceClock, Mark
from flexmask.engine.prefill_plan import PrefillPlan
from flexmask.engine.prefix_reuse import pays_off, shared_beginning
from flexmask.engine.prompts import Job
from flexmask.engine.row import Row
from flexmask.fusion import Fusion, majority
from flexmask.generation import Generation
from flexmask.sampling import Sampling
from flexmask.strategy import Strategy
from flexmask.tokenization import RequestTokenizer

if TYPE_CHECKING:
    from flexmask.engine.engine import Engine


@dataclass(frozen=True)
class RunOptions:
    """How tokens are generated.

    Attributes:
        max_new_tokens: Most tokens per request.
        sampling: How they are chosen.
        stop: Strings that end a row.
        fusion: What the prompts of a request have to do with each other.
        answer_of: Cuts the answer that a vote counts from a generation.
    """

    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    fusion: Fusion = Fusion()
    answer_of: Callable[[Generation], str] = attrgetter("prediction")


@dataclass(frozen=True)
class BatchSize:
    """What batches have room for.

    Attributes:
        rows: Prompts that run together.
        capacity: Slots of the key-value cache for each.
        group: Prompts of one job, at most.
    """

    rows: int
    capacity: int
    group: int


@dataclass(frozen=True)
class RunningBatch:
    """A batch between its halves.

    Attributes:
        jobs: What is generated for.
        computed_tokens: What its prefill computes.
        steps: The next token of each row, step by step.
        started: When the host began with it.
        marks: When the device began with prefill and with decoding.
        peak_bytes: Most device memory that each of the two took so far.
    """

    jobs: Sequence[Job]
    computed_tokens: int
    steps: Iterator[list[int]]
    started: float
    marks: tuple[Mark, Mark]
    peak_bytes: list[int]


@dataclass(frozen=True)
class FinishedBatch:
    """What came of a batch.

    Attributes:
        generations: By the number of their job, in request order.
        computed_tokens: What its prefill computed.
        prefill_s: Seconds of prefill.
        decode_s: Seconds of decode.
        first_token_s: Seconds until its first tokens were there.
        prefill_peak_bytes: Most device memory in use during prefill; 0 on a CPU.
        decode_peak_bytes: The same during decode.
    """

    generations: Mapping[int, Generation]
    computed_tokens: int
    prefill_s: float
    decode_s: float
    first_token_s: float
    prefill_peak_bytes: int
    decode_peak_bytes: int


class BatchRunner:
    """Runs batches of one size through the model."""

    def __init__(self, engine: Engine, tokenizer: RequestTokenizer, options: RunOptions) -> None:
        """Prepare nothing yet."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._options = options
        self._device: torch.device = engine.model.device
        self._clock = DeviceClock(self._device)
        self._planned: tuple[Sequence[Job], PrefillPlan] | None = None
        self._loop: DecodeLoop | None = None

    def prepare(
        self, strategy: Strategy, size: BatchSize, window: Sequence[Job]
    ) -> tuple[int, float]:
        """Make ready for batches of one size, and compute what prompts begin with alike.

        Args:
            strategy: Who sees whom.
            size: What they have room for.
            window: Jobs that will run.

        Returns:
            How many tokens that computed, and the seconds it took.
        """
        before = self._clock.mark()
        self._size, self._planned = size, None
        self._loop = self._engine.prepare(
            strategy, size.rows, size.capacity, self._options, size.group
        )
        runner = self._engine.runner
        runner.shared_prefix = None
        layouts = [layout for job in window for layout in job.layouts]
        length = shared_beginning(layouts)
        pays = length > 0 and pays_off(layouts, length, size.rows)
        computed = length if pays and runner.share_prefix(layouts[0], length) else 0
        return computed, self._clock.seconds(before, self._clock.mark())

    def release(self) -> None:
        """Give back what `prepare` allocated."""
        self._loop = None
        self._engine.release()

    def plan(self, jobs: Sequence[Job]) -> None:
        """Work out ahead what `start` will do for these jobs."""
        layouts = [layout for job in jobs for layout in job.layouts]
        self._planned = (jobs, self._engine.runner.plan(layouts))

    def start(self, jobs: Sequence[Job]) -> RunningBatch:
        """Take in a batch; on a GPU prefill and the first steps are queued when this returns."""
        started = time.perf_counter()
        if self._planned is None or self._planned[0] != jobs:
            self.plan(jobs)
        assert self._planned is not None and self._loop is not None
        plan = self._planned[1]
        seeds = [seed for job in jobs for seed in job.seeds]
        spare = self._size.rows - len(seeds)  # a constant number of rows compiles once
        groups = [self._options.fusion.weights_of(job.request) for job in jobs]
        last = [layout.token_ids[-1] for layout in plan.layouts]
        self._loop.load(last, [*seeds, *seeds[-1:] * spare], [*groups, *[(1.0,)] * spare])
        peaks = [0, 0]
        before = self._clock.mark()
        with self._peak_bytes(peaks, 0):
            plan = self._engine.runner.prefill(plan)
        prefilled = self._clock.mark()
        with self._peak_bytes(peaks, 1):
            steps = self._loop.run()
        computed = sum(plan.computed_tokens[: len(seeds)])
        return RunningBatch(jobs, computed, steps, started, (before, prefilled), peaks)

    def finish(self, batch: RunningBatch) -> FinishedBatch:
        """Run a batch until all of its rows have ended."""
        options, eos_token_ids = self._options, self._engine.eos_token_ids()
        rows = [
            Row(self._tokenizer, options.max_new_tokens, options.stop, eos_token_ids)
            for job in batch.jobs
            for _ in job.layouts
        ]
        first_token_s = 0.0
        with self._peak_bytes(batch.peak_bytes, 1):
            for token_ids in batch.steps:
                first_token_s = first_token_s or time.perf_counter() - batch.started
                for row, token_id in zip(rows, token_ids[: len(rows)], strict=True):
                    row.append(token_id)
                if all(row.finish_reason for row in rows):
                    break
        marks = (*batch.marks, self._clock.mark())
        unread = iter(rows)
        rows_of = {job.number: list(islice(unread, len(job.layouts))) for job in batch.jobs}
        by_number = sorted(batch.jobs, key=attrgetter("number"))
        return FinishedBatch(
            {job.number: self._generation(job, rows_of[job.number]) for job in by_number},
            batch.computed_tokens,
            self._clock.seconds(*marks[:2]),
            self._clock.seconds(*marks[1:]),
            first_token_s,
            *batch.peak_bytes,
        )

    def _generation(self, job: Job, rows: Sequence[Row]) -> Generation:
        """What the rows of a job come to: the same in all of them, or the answer of most."""
        request, prompt_tokens = job.request, sum(map(len, job.layouts))
        generations = [row.generation(request, prompt_tokens) for row in rows]
        if self._options.fusion.name != "vote":
            return generations[0]
        return generations[majority([*map(self._options.answer_of, generations)])]

    @contextmanager
    def _peak_bytes(self, peaks: list[int], phase: int) -> Iterator[None]:
        """Note the most memory that a phase allocates, which is when its work is queued."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        peaks[phase] = max(peaks[phase], torch.cuda.max_memory_allocated(self._device))
