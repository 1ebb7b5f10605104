"""Runs a batch in two halves, between which the host is free while a GPU computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.batch_row import Row
from flexmask.engine.decode_loop import DecodeLoop
from flexmask.engine.device_clock import DeviceClock, Mark
from flexmask.engine.generation_rules import GenerationRules
from flexmask.engine.model_runner import compilations
from flexmask.engine.prefill_plan import PrefillPlan
from flexmask.engine.prefix_reuse import pays_off, shared_beginning
from flexmask.engine.prompt_queue import Job
from flexmask.engine.row_processors import RowProcessors
from flexmask.engine.turns import TURN
from flexmask.errors import ModelError, RequestError
from flexmask.fusion import Fusion, majority
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.sampling import Sampling
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.engine.engine import Engine


@dataclass(frozen=True)
class RunOptions:
    """How tokens are generated.

    Attributes:
        max_new_tokens: Most tokens per request.
        rules: What the model's generation config asks for.
        sampling: How they are chosen.
        stop: Strings that end a row.
        fusion: What the prompts of a request have to do with each other.
        answer_of: Cuts the answer that a vote counts from a generation.
    """

    max_new_tokens: int
    rules: GenerationRules
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
        rows: The job of each prompt and its tokens, in the order of the batch.
        computed_tokens: What its prefill computed.
        prefill_s: Seconds of prefill.
        decode_s: Seconds of decode.
        first_token_s: Seconds until its first tokens were there.
        prefill_peak_bytes: Most device memory in use during prefill; 0 on a CPU.
        decode_peak_bytes: The same during decode.
    """

    rows: Sequence[tuple[Job, Sequence[Row]]]
    computed_tokens: int
    prefill_s: float
    decode_s: float
    first_token_s: float
    prefill_peak_bytes: int
    decode_peak_bytes: int


@dataclass(frozen=True)
class Refused:
    """A request that no tokens can be chosen for, and why."""

    request: Request
    error: RequestError


@dataclass(frozen=True)
class WorkCounts:
    """What a run has done beside its batches.

    Attributes:
        prefix_tokens: Tokens computed once for all prompts that begin with them.
        prefix_s: Seconds that took.
        compilations: Graphs compiled.
        mask_hits: BlockMasks found in the cache.
        mask_misses: BlockMasks built.
    """

    prefix_tokens: int = 0
    prefix_s: float = 0.0
    compilations: int = 0
    mask_hits: int = 0
    mask_misses: int = 0


class BatchRunner:
    """Runs the batches of one run through the model of an engine, which other runs use too.

    Each method takes its turn. Where another run's turn comes between the start and the end of a
    batch, that run finishes the batch for this one; where another has prepared the engine since,
    `start` prepares it again. So results are those of a run alone.

    Attributes:
        counts: What was done beside the batches so far.
    """

    def __init__(
        self, engine: Engine, strategy: Strategy, tokenizer: RequestTokenizer, options: RunOptions
    ) -> None:
        """Prepare nothing yet."""
        self.counts = WorkCounts()
        self._engine = engine
        self._strategy = strategy
        self._tokenizer = tokenizer
        self._options = options
        self._device: torch.device = engine.model.device
        self._clock = DeviceClock(self._device)
        self._size: BatchSize | None = None
        self._window: Sequence[Job] = ()
        self._planned: tuple[Sequence[Job], PrefillPlan] | None = None
        self._loop: DecodeLoop | None = None
        self._running: RunningBatch | None = None
        self._outcome: FinishedBatch | Exception | None = None

    def fit(self, size: BatchSize, window: Sequence[Job]) -> None:
        """Say what `start` prepares for.

        Args:
            size: What batches have room for.
            window: Jobs that will run.
        """
        if size != self._size:
            self._forget()
        self._size, self._window = size, window

    def release(self) -> None:
        """Give back what the engine holds for batches of this size."""
        with TURN:
            self._engine.occupancy.admit(self)
            self._forget()
            self._engine.release()

    def start(self, jobs: Sequence[Job]) -> None:
        """Take in a batch; on a GPU prefill and the first steps are queued when this returns."""
        with TURN:
            self._engine.occupancy.admit(self)
            with self._counting():
                if self._loop is None:
                    self._loop = self._prepare()
                self._running = self._start(jobs, self._loop)

    def finish(self, next_jobs: Sequence[Job] = ()) -> FinishedBatch:
        """Run the batch that was started until all of its rows have ended.

        Args:
            next_jobs: The batch after it, planned while the device computes this one.
        """
        with TURN:
            if self._running is not None:
                self._finish(self._running, next_jobs)
            outcome, self._outcome = self._outcome, None
        assert outcome is not None, "start comes first"
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def settle(self) -> None:
        """Finish the batch that is running, for `finish` to return; called in another's turn."""
        self._forget()
        if self._running is not None:
            self._finish(self._running)

    def outcomes(self, batch: FinishedBatch) -> dict[int, Generation | Refused]:
        """The outcome of each job of a batch by its number, in request order."""
        by_number = sorted(batch.rows, key=lambda rows: rows[0].number)
        return {job.number: self._outcome_of(job, rows) for job, rows in by_number}

    def _forget(self) -> None:
        self._loop = self._planned = None

    def _prepare(self) -> DecodeLoop:
        """Make the engine ready, and compute what prompts begin with alike."""
        size, runner = self._size, self._engine.runner
        assert size is not None, "fit comes first"
        before = self._clock.mark()
        loop = self._engine.prepare(
            self._strategy, size.rows, size.capacity, self._options, size.group
        )
        runner.shared_prefix = None
        layouts = [layout for job in self._window for layout in job.layouts]
        length = shared_beginning(layouts)
        pays = length > 0 and pays_off(layouts, length, size.rows)
        computed = length if pays and runner.share_prefix(layouts[0], length) else 0
        seconds = self._clock.seconds(before, self._clock.mark())
        self.counts = replace(
            self.counts,
            prefix_tokens=self.counts.prefix_tokens + computed,
            prefix_s=self.counts.prefix_s + seconds,
        )
        return loop

    def _plan(self, jobs: Sequence[Job]) -> PrefillPlan:
        """Work out what `start` does for these jobs, or did already."""
        if self._planned is None or self._planned[0] != jobs:
            layouts = [layout for job in jobs for layout in job.layouts]
            self._planned = (jobs, self._engine.runner.plan(layouts))
        return self._planned[1]

    def _start(self, jobs: Sequence[Job], loop: DecodeLoop) -> RunningBatch:
        started = time.perf_counter()
        assert self._size is not None
        plan = self._plan(jobs)
        seeds = [seed for job in jobs for seed in job.seeds]
        spare = self._size.rows - len(seeds)  # a constant number of rows compiles once
        groups = [self._options.fusion.weights_of(job.request) for job in jobs]
        last = [layout.token_ids[-1] for layout in plan.layouts]
        seeds_of_rows = [*seeds, *seeds[-1:] * spare]
        groups_of_rows = [*groups, *[(1.0,)] * spare]
        loop.load(last, seeds_of_rows, groups_of_rows, self._processors(jobs))
        peaks = [0, 0]
        before = self._clock.mark()
        with self._peak_bytes(peaks, 0):
            plan = self._engine.runner.prefill(plan)
        prefilled = self._clock.mark()
        with self._peak_bytes(peaks, 1):
            steps = loop.run()
        computed = sum(plan.computed_tokens[: len(seeds)])
        return RunningBatch(jobs, computed, steps, started, (before, prefilled), peaks)

    def _processors(self, jobs: Sequence[Job]) -> RowProcessors | None:
        rules, max_new_tokens = self._options.rules, self._options.max_new_tokens
        if not rules.applied:
            return None
        prompts = [layout.token_ids for job in jobs for layout in job.layouts]
        return RowProcessors(rules, prompts, max_new_tokens, self._device)

    def _finish(self, batch: RunningBatch, next_jobs: Sequence[Job] = ()) -> None:
        """Leave what comes of a batch as the outcome, which may be an error."""
        self._running = None
        # What stands if this is interrupted in another run's turn.
        self._outcome = ModelError(
            "another run of this engine was interrupted while it finished a batch of this one; "
            "run these requests again"
        )
        try:
            with self._counting():
                if next_jobs:
                    self._plan(next_jobs)
                self._outcome = self._read(batch)
        except Exception as error:  # raised where the run itself goes on
            self._outcome = error

    def _read(self, batch: RunningBatch) -> FinishedBatch:
        options = self._options
        rows = [
            Row(self._tokenizer, options.max_new_tokens, options.stop, options.rules.eos_token_ids)
            for job in batch.jobs
            for _ in job.layouts
        ]
        first_token_s = 0.0
        with self._peak_bytes(batch.peak_bytes, 1):
            for token_ids in batch.steps:
                first_token_s = first_token_s or time.perf_counter() - batch.started
                for row, token_id in zip(rows, token_ids[: len(rows)], strict=True):
                    row.append(token_id)
                if all(row.is_complete for row in rows):
                    break
        marks = (*batch.marks, self._clock.mark())
        unread = iter(rows)
        return FinishedBatch(
            [(job, list(islice(unread, len(job.layouts)))) for job in batch.jobs],
            batch.computed_tokens,
            self._clock.seconds(*marks[:2]),
            self._clock.seconds(*marks[1:]),
            first_token_s,
            *batch.peak_bytes,
        )

    def _outcome_of(self, job: Job, rows: Sequence[Row]) -> Generation | Refused:
        """What the rows of a job come to: the same in all of them, or the answer of most."""
        request, prompt_tokens = job.request, sum(map(len, job.layouts))
        if fault := next((row.fault for row in rows if row.fault), ""):
            uuid = f" (request {request.uuid!r})" if request.source else ""
            return Refused(request, RequestError(f"{request.label}{uuid}: {fault}"))
        generations = [row.generation(request, prompt_tokens) for row in rows]
        if self._options.fusion.name != "vote":
            return generations[0]
        return generations[majority([*map(self._options.answer_of, generations)])]

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count what is compiled and which masks are built, by this run and no other."""
        compiled, masks = compilations(), self._engine.mask_cache.stats
        try:
            yield
        finally:
            counts, later = self.counts, self._engine.mask_cache.stats
            self.counts = replace(
                counts,
                compilations=counts.compilations + compilations() - compiled,
                mask_hits=counts.mask_hits + later.hits - masks.hits,
                mask_misses=counts.mask_misses + later.misses - masks.misses,
            )

    @contextmanager
    def _peak_bytes(self, peaks: list[int], phase: int) -> Iterator[None]:
        """Note the most memory that a phase allocates, which is when its work is queued."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        peaks[phase] = max(peaks[phase], torch.cuda.max_memory_allocated(self._device))
