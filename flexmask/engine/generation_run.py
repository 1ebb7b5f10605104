"""One run of the engine: batches of prompts, and what came of them."""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from threading import RLock
from typing import TYPE_CHECKING

import torch

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.batch_runner import (
    BatchRunner,
    BatchSize,
    FinishedBatch,
    Refused,
    RunOptions,
    WorkCounts,
)
from flexmask.engine.model_runner import bucketed_capacity
from flexmask.engine.prompt_queue import Job, OnRefused
from flexmask.engine.run_stats import RunStats
from flexmask.errors import FlexMaskWarning, ModelError
from flexmask.generation import Generation
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.engine.engine import Engine

_Outcomes = Mapping[int, Generation | Refused]


class GenerationRun(Iterator[Generation]):
    """The generations of one `Engine.generate` call, in request order, and counts.

    Prompts of similar length run together, so generations finish in another order; `batches`
    has them as they do. Several threads may share one run, and several runs one engine.

    Attributes:
        rules: What the model's generation config asks for in this run.
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
        on_refused: OnRefused | None = None,
    ) -> None:
        """Plan the first prompts; iterating starts the run."""
        self.rules = options.rules
        self._max_new_tokens = options.max_new_tokens
        self._on_refused = on_refused
        first = next(windows, [])
        self._windows = chain([first], windows)
        capacity = self._capacity_for(first)
        rows = batch_size or engine.auto_batch_size(
            sum(len(job.layouts) for job in first), capacity, _largest(first)
        )
        self._group_size = 1
        self.stats = RunStats(batch_size=rows, capacity=capacity)
        self._counted = WorkCounts()
        self._compiled_by_first_batch: int | None = None
        self._runner = BatchRunner(engine, strategy, tokenizer, options)
        self._overlaps = engine.model.device.type == "cuda"
        self._finished = self._run()
        self._waiting: dict[int, Generation | None] = {}
        self._next_number = 0
        self._lock = RLock()

    def __next__(self) -> Generation:
        """Return the next generation in request order.

        Raises:
            RequestError: If no token can be chosen for a request, since logits are NaN or
                infinite, and there is no ``on_refused``.
        """
        with self._lock:
            while True:
                while self._next_number not in self._waiting:
                    self._waiting.update(next(self._finished))
                self._next_number += 1
                generation = self._waiting.pop(self._next_number - 1)
                if generation is not None:
                    return generation

    def batches(self) -> Iterator[list[Generation]]:
        """The generations of each batch as it finishes.

        Raises:
            RequestError: As iterating does.
        """
        while True:
            with self._lock:
                finished = next(self._finished, None)
            if finished is None:
                return
            yield [generation for generation in finished.values() if generation is not None]

    def _run(self) -> Iterator[dict[int, Generation | None]]:
        for window in self._windows:
            self._make_room(window)
            # The longest first: where memory does not suffice, that shows at once.
            todo = deque(sorted(window, key=lambda job: -job.longest))
            finished: _Outcomes | None = None
            while todo:
                jobs = self._take_batch(todo)
                try:
                    has_started = self._start(jobs, window)
                finally:
                    if finished is not None:
                        # What takes them in works while the device does.
                        yield from self._hand_out(finished)
                finished = None
                if has_started:
                    ahead = self._take_batch(deque(todo)) if self._overlaps else []
                    finished = self._finish(ahead)
                if finished is None:
                    todo.extendleft(reversed(jobs))
                    self._halve(window)
                elif not self._overlaps:
                    yield from self._hand_out(finished)
                    finished = None
            if finished is not None:
                yield from self._hand_out(finished)

    def _hand_out(self, outcomes: _Outcomes) -> Iterator[dict[int, Generation | None]]:
        """The generations of a batch; None for a request that is refused.

        Raises:
            RequestError: The first refusal, after the others are handed out, if nobody takes it.
        """
        refused = [one for one in outcomes.values() if isinstance(one, Refused)]
        if self._on_refused is not None:
            for one in refused:
                self._on_refused(one.request, one.error)
        yield {
            number: outcome if isinstance(outcome, Generation) else None
            for number, outcome in outcomes.items()
        }
        if refused and self._on_refused is None:
            raise refused[0].error

    def _make_room(self, window: Sequence[Job]) -> None:
        """See to it that every job of a window fits, in slots and in rows."""
        stats = self.stats
        capacity = max(stats.capacity, self._capacity_for(window))
        batch_size = max(stats.batch_size, _largest(window))
        self._group_size = max(self._group_size, _largest(window))
        self.stats = replace(stats, capacity=capacity, batch_size=batch_size)

    def _take_batch(self, todo: deque[Job]) -> list[Job]:
        """Take the first jobs whose rows fit; those of a job stay together."""
        batch: list[Job] = []
        room = self.stats.batch_size
        while todo and (room := room - len(todo[0].layouts)) >= 0:
            batch.append(todo.popleft())
        return batch

    def _start(self, jobs: Sequence[Job], window: Sequence[Job]) -> bool:
        """Start a batch; False if the device's memory does not suffice."""
        size = BatchSize(self.stats.batch_size, self.stats.capacity, self._group_size)
        self._runner.fit(size, window)
        try:
            self._runner.start(jobs)
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    def _finish(self, next_jobs: Sequence[Job]) -> _Outcomes | None:
        """Run a batch to its end; None if the device's memory does not suffice."""
        try:
            finished = self._runner.finish(next_jobs)
        except torch.cuda.OutOfMemoryError:
            return None
        outcomes = self._runner.outcomes(finished)
        generations = [one for one in outcomes.values() if isinstance(one, Generation)]
        self._count(finished, generations)
        return outcomes

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
        self._runner.release()
        gc.collect()
        torch.cuda.empty_cache()
        message = f"out of GPU memory: {size} rows at a time become {smaller}"
        warnings.warn(message, FlexMaskWarning, stacklevel=2)
        halvings = self.stats.halvings + 1
        self.stats = replace(self.stats, batch_size=smaller, halvings=halvings)

    def _count(self, batch: FinishedBatch, generations: Sequence[Generation]) -> None:
        stats, counts, before = self.stats, self._runner.counts, self._counted
        self._counted = counts
        if self._compiled_by_first_batch is None:
            self._compiled_by_first_batch = counts.compilations
        computed_tokens = batch.computed_tokens + counts.prefix_tokens - before.prefix_tokens
        self.stats = replace(
            stats,
            rows=stats.rows + len(generations),
            prompt_tokens=stats.prompt_tokens + sum(g.prompt_tokens for g in generations),
            computed_tokens=stats.computed_tokens + computed_tokens,
            generated_tokens=stats.generated_tokens + sum(len(g.token_ids) for g in generations),
            prefill_s=stats.prefill_s + batch.prefill_s + counts.prefix_s - before.prefix_s,
            decode_s=stats.decode_s + batch.decode_s,
            first_token_s=stats.first_token_s + batch.first_token_s,
            compilations=counts.compilations,
            warm_compilations=counts.compilations - self._compiled_by_first_batch,
            mask_hits=counts.mask_hits,
            mask_misses=counts.mask_misses,
            prefill_peak_bytes=max(stats.prefill_peak_bytes, batch.prefill_peak_bytes),
            decode_peak_bytes=max(stats.decode_peak_bytes, batch.decode_peak_bytes),
        )

    def _capacity_for(self, jobs: Sequence[Job]) -> int:
        longest = max((job.longest for job in jobs), default=1)
        return bucketed_capacity(longest + self._max_new_tokens)


def _largest(jobs: Sequence[Job]) -> int:
    return max((len(job.layouts) for job in jobs), default=1)
