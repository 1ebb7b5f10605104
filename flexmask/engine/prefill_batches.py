"""Batches of prompts that are one prefill each: after it, nothing is decoded."""

from __future__ import annotations

import gc
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import torch

from flexmask.engine.executor import Executor
from flexmask.engine.memory import is_out_of_memory
from flexmask.engine.model_runner import ModelRunner, bucketed_capacity
from flexmask.engine.prefill_plan import PrefillPlan
from flexmask.engine.run_stats import RunStats
from flexmask.engine.turns import TURN
from flexmask.errors import FlexMaskWarning, ModelError
from flexmask.layout import Layout
from flexmask.strategy import Strategy
from flexmask.torch_internals import compiled_graphs

Prompt = TypeVar("Prompt")
Result = TypeVar("Result")


class PrefillBatches(ABC, Generic[Prompt, Result]):
    """Runs prompts, a batch at a time, on an executor that others use too.

    A batch is one prefill of all its prompts; nothing is decoded. So nothing is in flight between
    two batches. A subclass says what is computed of a prompt, and what comes of it.

    Attributes:
        stats: Work and times so far.
    """

    def __init__(self, executor: Executor, strategy: Strategy, batch_size: int | None) -> None:
        """Store what batches need; the executor is prepared by the first one.

        Args:
            executor: Executes the batches.
            strategy: The mask strategy of the batches.
            batch_size: Prompts that run together; None to choose.
        """
        self._executor = executor
        self._strategy = strategy
        self._batch_size = batch_size
        self.stats = RunStats(batch_size=0, capacity=0)

    @abstractmethod
    def _layout_of(self, prompt: Prompt) -> Layout:
        """Return the layout of a prompt."""

    @abstractmethod
    def _compute(
        self, runner: ModelRunner, prompts: Sequence[Prompt]
    ) -> tuple[PrefillPlan, list[Result]]:
        """Compute prompts in the rows 0, 1 and so on.

        Returns:
            The plan of the prefill, and the result of each prompt.
        """

    def _share(
        self, runner: ModelRunner, upcoming: Sequence[Layout], rows: int
    ) -> PrefillPlan | None:
        """Compute what upcoming batches share; returns the plan that was carried out, if any."""
        return None

    def settle(self) -> None:
        """Do nothing: no prompt is in flight when another run takes its turn."""

    def results(self, prompts: Sequence[Prompt]) -> Iterator[list[tuple[int, Result]]]:
        """Run prompts, those of similar length together; yield some results at a time.

        Where memory runs out, batches are halved.

        Returns:
            For some of the prompts the index and the result.

        Raises:
            ModelError: If memory does not suffice for a single prompt.
        """
        if not prompts:
            return
        layouts = [self._layout_of(prompt) for prompt in prompts]
        # The longest first: if memory does not suffice, that shows at once.
        waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(layouts[index])))
        capacity = bucketed_capacity(1 + len(layouts[waiting[0]]))
        capacity = max(capacity, self.stats.capacity)
        chosen = self._batch_size or self._executor.auto_batch_size(len(prompts), capacity)
        rows = max(1, self._executor.runner.rows_that_fit(chosen, capacity))
        # The same shapes for every lookahead, and no size again that did not fit.
        bound = min if self.stats.halvings else max
        rows = bound(rows, self.stats.batch_size or rows)
        while waiting:
            some = [waiting.popleft() for _ in range(min(rows, len(waiting)))]
            self.stats = replace(self.stats, batch_size=rows, capacity=capacity)
            try:
                results = self._batch([prompts[index] for index in some], rows, capacity, layouts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                yield list(zip(some, results, strict=True))
                continue
            # Outside of the handler, because the error holds the tensors of its frames.
            waiting.extendleft(reversed(some))
            rows = self._halved(rows, capacity)

    def _batch(
        self, prompts: Sequence[Prompt], rows: int, capacity: int, upcoming: Sequence[Layout]
    ) -> list[Result]:
        """Run one batch; return the result of each prompt.

        Args:
            prompts: The prompts, at most ``rows``.
            rows: Batch rows that the executor is prepared for.
            capacity: Slots per row.
            upcoming: All prompts of the lookahead.
        """
        runner, started = self._executor.runner, time.perf_counter()
        with TURN:
            self._executor.occupancy.admit(self)
            compiled, masks = compiled_graphs(), self._executor.mask_cache.stats
            shared = None
            if runner.prepare(self._strategy, rows, capacity):
                shared = self._share(runner, upcoming, rows)
            plan, results = self._compute(runner, prompts)
            later = self._executor.mask_cache.stats
        done = RunStats(
            batch_size=rows,
            capacity=capacity,
            prefills=1,
            copied_tokens=plan.copied_tokens,
            prefill_s=time.perf_counter() - started,
            compilations=compiled_graphs() - compiled,
            mask_hits=later.hits - masks.hits,
            mask_misses=later.misses - masks.misses,
            **sum((Counter(one.work) for one in (plan, shared) if one), Counter()),
        )
        self.stats = self.stats.plus(done)
        return results

    def _halved(self, rows: int, capacity: int) -> int:
        """Free memory, and return a smaller number of rows.

        Raises:
            ModelError: If there is one row only.
        """
        on_gpu = self._executor.runner.device.type == "cuda"
        memory = "GPU memory" if on_gpu else "memory"
        with TURN:
            self._executor.release()
        if rows == 1:
            raise ModelError(
                f"not enough {memory} for one row of {capacity} slots; shorten the prompts"
            )
        gc.collect()
        torch.cuda.empty_cache()
        smaller = max(1, self._executor.runner.rows_that_fit(rows // 2, capacity))
        message = f"out of {memory}: {rows} rows at a time become {smaller}"
        warnings.warn(message, FlexMaskWarning, stacklevel=2)
        halvings = self.stats.halvings + 1
        self.stats = replace(self.stats, batch_size=smaller, halvings=halvings)
        return smaller
