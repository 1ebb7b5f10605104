"""One run of the engine: batches of prompts, and what came of them."""

from __future__ import annotations

import gc
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from flexmask.engine.decode_loop import DecodeLoop
from flexmask.engine.device_clock import DeviceClock, Mark
from flexmask.engine.model_runner import bucketed_capacity, compilations
from flexmask.engine.prefill_plan import PrefillPlan
from flexmask.engine.prefix_reuse import pays_off, shared_beginning
from flexmask.engine.prompts import Job
from flexmask.engine.row import Row
from flexmask.engine.run_stats import RunStats
from flexmask.engine.sampling import Sampling
from flexmask.errors import FlexMaskWarning, ModelError
from flexmask.fusion import Fusion, majority
from flexmask.generation import Generation
from flexmask.layout import Layout
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


class GenerationRun(Iterator[Generation]):
    """The generations of one `Engine.generate` call, in request order, and counts.

    Prompts of similar length run together, so generations finish in another order; `batches`
    has them as they do.

    Attributes:
        stats: What the run has done so far.
    """

    def __init__(
        self,
        engine: Engine,
        strategy: Strategy,
        tokenizer: RequestTokenizer,
        windows: Iterator[list[Job]],
        options: RunOptions,
        batch_size: int | None,
    ) -> None:
        """Plan the first prompts; iterating starts the run."""
        self._engine = engine
        self._strategy = strategy
        self._tokenizer = tokenizer
        self._options = options
        first = next(windows, [])
        self._windows = chain([first], windows)
        capacity = self._capacity_for(first)
        rows = batch_size or engine.auto_batch_size(
            sum(len(job.layouts) for job in first), capacity, _largest(first)
        )
        self._group_size = 1
        self.stats = RunStats(batch_size=rows, capacity=capacity)
        self._counted_from = (engine.mask_cache.stats, compilations())
        self._is_ready = False
        self._loop: DecodeLoop | None = None
        self._clock = DeviceClock(engine.model.device)
        self._overlaps = engine.model.device.type == "cuda"
        self._planned: tuple[Sequence[Job], PrefillPlan] | None = None
        self._finished = self._run()
        self._waiting: dict[int, Generation] = {}
        self._next_number = 0

    def __next__(self) -> Generation:
        """Return the next generation in request order."""
        while self._next_number not in self._waiting:
            self._waiting.update(next(self._finished))
        self._next_number += 1
        return self._waiting.pop(self._next_number - 1)

    def batches(self) -> Iterator[list[Generation]]:
        """The generations of each batch as it finishes."""
        for finished in self._finished:
            yield list(finished.values())

    def _run(self) -> Iterator[dict[int, Generation]]:
        for window in self._windows:
            self._make_room(window)
            # The longest first: where memory does not suffice, that shows at once.
            todo = deque(sorted(window, key=lambda job: -job.longest))
            finished: dict[int, Generation] | None = None
            while todo:
                jobs = self._take_batch(todo)
                try:
                    running = self._start(jobs, window)
                finally:
                    if finished is not None:
                        # What takes them in works while the device does.
                        yield finished
                finished = None
                if running is not None:
                    self._plan_ahead(todo)
                    finished = self._finish(running)
                    running = None  # whose memory may be wanted
                if finished is None:
                    todo.extendleft(reversed(jobs))
                    self._halve(window)
                elif not self._overlaps:
                    yield finished
                    finished = None
            if finished is not None:
                yield finished

    def _make_room(self, window: Sequence[Job]) -> None:
        """See to it that every job of a window fits, in slots and in rows."""
        stats, group_size = self.stats, self._group_size
        capacity = max(stats.capacity, self._capacity_for(window))
        batch_size = max(stats.batch_size, _largest(window))
        self._group_size = max(group_size, _largest(window))
        self.stats = replace(stats, capacity=capacity, batch_size=batch_size)
        self._is_ready &= self.stats == stats and self._group_size == group_size

    def _take_batch(self, todo: deque[Job]) -> list[Job]:
        """Take the first jobs whose rows fit; those of a job stay together."""
        batch: list[Job] = []
        room = self.stats.batch_size
        while todo and (room := room - len(todo[0].layouts)) >= 0:
            batch.append(todo.popleft())
        return batch

    def _plan_ahead(self, todo: deque[Job]) -> None:
        """Plan the next batch while the device is busy with this one."""
        self._planned = None
        if todo and self._overlaps:
            jobs = self._take_batch(deque(todo))
            self._planned = (jobs, self._engine.runner.plan(self._padded(jobs)))

    def _start(self, jobs: Sequence[Job], window: Sequence[Job]) -> _RunningBatch | None:
        """Start a batch; None if the device's memory does not suffice."""
        try:
            if not self._is_ready:
                self._make_ready(window)
            return self._start_batch(jobs)
        except torch.cuda.OutOfMemoryError:
            return None

    def _finish(self, batch: _RunningBatch) -> dict[int, Generation] | None:
        """Run a batch to its end; None if the device's memory does not suffice."""
        try:
            return self._finish_batch(batch)
        except torch.cuda.OutOfMemoryError:
            return None

    def _make_ready(self, window: Sequence[Job]) -> None:
        stats = self.stats
        self._loop = self._engine.prepare(
            self._strategy, stats.batch_size, stats.capacity, self._options, self._group_size
        )
        started, runner = time.perf_counter(), self._engine.runner
        layouts = [layout for job in window for layout in job.layouts]
        length = shared_beginning(layouts)
        runner.shared_prefix = self._planned = None
        pays = length > 0 and pays_off(layouts, length, stats.batch_size)
        if pays and runner.share_prefix(layouts[0], length):
            stats = replace(stats, computed_tokens=stats.computed_tokens + length)
        self._synchronize()
        prefill_s = stats.prefill_s + time.perf_counter() - started
        self.stats = replace(stats, prefill_s=prefill_s)
        self._is_ready = True

    def _halve(self, window: Sequence[Job]) -> None:
        """Give memory back and go on with half as many rows, but no less than a job has.

        Raises:
            ModelError: If there are no more than that.
        """
        size, capacity, least = self.stats.batch_size, self.stats.capacity, _largest(window)
        if size == least:
            rows = "one row" if least == 1 else f"the {least} rows of a request"
            raise ModelError(
                f"not enough GPU memory for {rows} of {capacity} slots; shorten the prompts"
                + ("" if least == 1 else " or take fewer segments")
            )
        smaller = max(size // 2, least)
        self._is_ready = False
        self._loop = None
        self._engine.release()
        gc.collect()
        torch.cuda.empty_cache()
        message = f"out of GPU memory: {size} rows at a time become {smaller}"
        warnings.warn(message, FlexMaskWarning, stacklevel=2)
        halvings = self.stats.halvings + 1
        self.stats = replace(self.stats, batch_size=smaller, halvings=halvings)

    def _padded(self, jobs: Sequence[Job]) -> list[Layout]:
        """A layout for each row: a constant number of rows compiles once."""
        layouts = [layout for job in jobs for layout in job.layouts]
        return [*layouts, *layouts[-1:] * (self.stats.batch_size - len(layouts))]

    def _start_batch(self, jobs: Sequence[Job]) -> _RunningBatch:
        """Queue prefill and first steps."""
        runner, loop, started = self._engine.runner, self._loop, time.perf_counter()
        assert loop is not None
        if self._planned is None or self._planned[0] != jobs:
            self._planned = (jobs, runner.plan(self._padded(jobs)))
        plan = self._planned[1]
        seeds = [seed for job in jobs for seed in job.seeds]
        spare = len(plan.layouts) - len(seeds)
        groups = [self._options.fusion.weights_of(job.request) for job in jobs]
        last = [layout.token_ids[-1] for layout in plan.layouts]
        loop.load(last, [*seeds, *seeds[-1:] * spare], [*groups, *[(1.0,)] * spare])
        marks = [self._clock.mark()]
        with self._peak_bytes("prefill_peak_bytes"):
            plan = runner.prefill(plan)
        marks.append(self._clock.mark())
        with self._peak_bytes("decode_peak_bytes"):
            steps = loop.run()
        return _RunningBatch(jobs, sum(plan.computed_tokens[: len(seeds)]), steps, started, marks)

    def _finish_batch(self, batch: _RunningBatch) -> dict[int, Generation]:
        options, eos_token_ids = self._options, self._engine.eos_token_ids()
        rows = [
            Row(self._tokenizer, options.max_new_tokens, options.stop, eos_token_ids)
            for job in batch.jobs
            for _ in job.layouts
        ]
        first_token_s = 0.0
        with self._peak_bytes("decode_peak_bytes"):
            for token_ids in batch.steps:
                first_token_s = first_token_s or time.perf_counter() - batch.started
                for row, token_id in zip(rows, token_ids[: len(rows)], strict=True):
                    row.append(token_id)
                if all(row.finish_reason for row in rows):
                    break
        start, prefilled, end = *batch.marks, self._clock.mark()
        self.stats = replace(
            self.stats,
            computed_tokens=self.stats.computed_tokens + batch.computed_tokens,
            prefill_s=self.stats.prefill_s + self._clock.seconds(start, prefilled),
            decode_s=self.stats.decode_s + self._clock.seconds(prefilled, end),
            first_token_s=self.stats.first_token_s + first_token_s,
        )
        unread = iter(rows)
        rows_of = {job.number: list(islice(unread, len(job.layouts))) for job in batch.jobs}
        by_number = sorted(batch.jobs, key=attrgetter("number"))
        finished = {job.number: self._generation(job, rows_of[job.number]) for job in by_number}
        self._count(list(finished.values()))
        return finished

    def _generation(self, job: Job, rows: Sequence[Row]) -> Generation:
        """What the rows of a job come to: the same in all of them, or the answer of most."""
        request, prompt_tokens = job.request, sum(map(len, job.layouts))
        generations = [row.generation(request, prompt_tokens) for row in rows]
        if self._options.fusion.name != "vote":
            return generations[0]
        return generations[majority([*map(self._options.answer_of, generations)])]

    def _count(self, generations: Sequence[Generation]) -> None:
        stats = self.stats
        if stats.rows == 0:
            self._compiled_by_first_batch = compilations()
        (cache_before, compiled), cache = self._counted_from, self._engine.mask_cache.stats
        self.stats = replace(
            stats,
            rows=stats.rows + len(generations),
            prompt_tokens=stats.prompt_tokens + sum(g.prompt_tokens for g in generations),
            generated_tokens=stats.generated_tokens + sum(len(g.token_ids) for g in generations),
            compilations=compilations() - compiled,
            warm_compilations=compilations() - self._compiled_by_first_batch,
            mask_hits=cache.hits - cache_before.hits,
            mask_misses=cache.misses - cache_before.misses,
        )

    def _capacity_for(self, jobs: Sequence[Job]) -> int:
        longest = max((job.longest for job in jobs), default=1)
        return bucketed_capacity(longest + self._options.max_new_tokens)

    @contextmanager
    def _peak_bytes(self, name: str) -> Iterator[None]:
        """Note the most memory that a phase allocates, which is when its work is queued."""
        device = self._engine.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield
        if device.type == "cuda":
            peak = max(getattr(self.stats, name), torch.cuda.max_memory_allocated(device))
            self.stats = replace(self.stats, **{name: peak})

    def _synchronize(self) -> None:
        if self._engine.model.device.type == "cuda":
            torch.cuda.synchronize(self._engine.model.device)


@dataclass(frozen=True)
class _RunningBatch:
    """A batch on its way.

    Attributes:
        jobs: What is generated for.
        computed_tokens: What its prefill computes.
        steps: The next token of each row, step by step.
        started: When the host began with it.
        marks: When the device began with prefill and with decoding.
    """

    jobs: Sequence[Job]
    computed_tokens: int
    steps: Iterator[list[int]]
    started: float
    marks: Sequence[Mark]


def _largest(jobs: Sequence[Job]) -> int:
    return max((len(job.layouts) for job in jobs), default=1)
