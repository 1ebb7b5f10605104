"""One run of the engine: batches of prompts, and what came of them."""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch

from flexmask.engine.batch_runner import (
    BatchRunner,
    BatchSize,
    FinishedBatch,
    RunningBatch,
    RunOptions,
)
from flexmask.engine.model_runner import bucketed_capacity, compilations
from flexmask.engine.prompts import Job
from flexmask.engine.run_stats import RunStats
from flexmask.errors import FlexMaskWarning, ModelError
from flexmask.generation import Generation
from flexmask.strategy import Strategy
from flexmask.tokenization import RequestTokenizer

if TYPE_CHECKING:
    from flexmask.engine.engine import Engine


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
        self._max_new_tokens = options.max_new_tokens
        first = next(windows, [])
        self._windows = chain([first], windows)
        capacity = self._capacity_for(first)
        rows = batch_size or engine.auto_batch_size(
            sum(len(job.layouts) for job in first), capacity, _largest(first)
        )
        self._group_size = 1
        self.stats = RunStats(batch_size=rows, capacity=capacity)
        self._counted_from = (engine.mask_cache.stats, compilations())
        self._runner = BatchRunner(engine, tokenizer, options)
        self._is_ready = False
        self._overlaps = engine.model.device.type == "cuda"
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
                    if todo and self._overlaps:
                        self._runner.plan(self._take_batch(deque(todo)))
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

    def _start(self, jobs: Sequence[Job], window: Sequence[Job]) -> RunningBatch | None:
        """Start a batch; None if the device's memory does not suffice."""
        try:
            if not self._is_ready:
                self._make_ready(window)
            return self._runner.start(jobs)
        except torch.cuda.OutOfMemoryError:
            return None

    def _finish(self, batch: RunningBatch) -> dict[int, Generation] | None:
        """Run a batch to its end; None if the device's memory does not suffice."""
        try:
            finished = self._runner.finish(batch)
        except torch.cuda.OutOfMemoryError:
            return None
        self._count(finished)
        return dict(finished.generations)

    def _make_ready(self, window: Sequence[Job]) -> None:
        stats = self.stats
        size = BatchSize(stats.batch_size, stats.capacity, self._group_size)
        computed_tokens, seconds = self._runner.prepare(self._strategy, size, window)
        self.stats = replace(
            stats,
            computed_tokens=stats.computed_tokens + computed_tokens,
            prefill_s=stats.prefill_s + seconds,
        )
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
        self._runner.release()
        gc.collect()
        torch.cuda.empty_cache()
        message = f"out of GPU memory: {size} rows at a time become {smaller}"
        warnings.warn(message, FlexMaskWarning, stacklevel=2)
        halvings = self.stats.halvings + 1
        self.stats = replace(self.stats, batch_size=smaller, halvings=halvings)

    def _count(self, batch: FinishedBatch) -> None:
        stats, generations = self.stats, batch.generations.values()
        if stats.rows == 0:
            self._compiled_by_first_batch = compilations()
        (cache_before, compiled), cache = self._counted_from, self._engine.mask_cache.stats
        self.stats = replace(
            stats,
            rows=stats.rows + len(generations),
            prompt_tokens=stats.prompt_tokens + sum(g.prompt_tokens for g in generations),
            computed_tokens=stats.computed_tokens + batch.computed_tokens,
            generated_tokens=stats.generated_tokens + sum(len(g.token_ids) for g in generations),
            prefill_s=stats.prefill_s + batch.prefill_s,
            decode_s=stats.decode_s + batch.decode_s,
            first_token_s=stats.first_token_s + batch.first_token_s,
            compilations=compilations() - compiled,
            warm_compilations=compilations() - self._compiled_by_first_batch,
            mask_hits=cache.hits - cache_before.hits,
            mask_misses=cache.misses - cache_before.misses,
            prefill_peak_bytes=max(stats.prefill_peak_bytes, batch.prefill_peak_bytes),
            decode_peak_bytes=max(stats.decode_peak_bytes, batch.decode_peak_bytes),
        )

    def _capacity_for(self, jobs: Sequence[Job]) -> int:
        longest = max((job.longest for job in jobs), default=1)
        return bucketed_capacity(longest + self._max_new_tokens)


def _largest(jobs: Sequence[Job]) -> int:
    return max((len(job.layouts) for job in jobs), default=1)
