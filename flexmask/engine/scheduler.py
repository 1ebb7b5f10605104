"""The scheduler of a run: groups prompts into batches, and halves these if memory runs out."""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.batch_runner import BatchRunner, FinishedBatch
from flexmask.engine.executor import BatchSize, Executor
from flexmask.engine.memory import is_out_of_memory
from flexmask.engine.model_runner import bucketed_capacity
from flexmask.engine.prompt_group import PromptGroup
from flexmask.engine.run_options import RunOptions
from flexmask.engine.run_stats import RunStats
from flexmask.errors import FlexMaskWarning, ModelError
from flexmask.strategy import Strategy


class Scheduler:
    """Runs the prompts of one run, batch by batch.

    Within a lookahead the longest prompts run first, so prompts of similar length share a batch.

    Attributes:
        stats: Counts and times of the batches finished so far; generations are not counted here.
        overlaps: True if a batch is started before the results of the one before are handed out.
    """

    def __init__(
        self,
        executor: Executor,
        strategy: Strategy,
        tokenizer: RequestTokenizer,
        options: RunOptions,
        lookaheads: Iterator[Sequence[PromptGroup]],
        batch_size: int | None,
    ) -> None:
        """Take the first lookahead, and choose a batch size that suits it.

        Args:
            executor: Executes the batches.
            strategy: The mask strategy.
            tokenizer: Decodes generated tokens.
            options: The options of the run.
            lookaheads: The prompts of the run, as many at a time as are sorted by length.
            batch_size: Prompts that run together; None to choose.

        Raises:
            RequestError: If a request cannot be planned, and the planner raises for it.
            ModelError: If the GPU has no memory for a single row.
        """
        self._max_new_tokens = options.max_new_tokens
        first = next(lookaheads, [])
        self._lookaheads = chain([first], lookaheads)
        capacity = self._capacity_for(first)
        rows = batch_size or executor.auto_batch_size(
            sum(len(group.layouts) for group in first), capacity, _largest(first)
        )
        self._group_size = 1
        self.stats = RunStats(batch_size=rows, capacity=capacity)
        self._has_finished_a_batch = False
        self._runner = BatchRunner(executor, strategy, tokenizer, options)
        self._rows_that_fit = executor.runner.rows_that_fit
        self.overlaps = executor.runner.device.type == "cuda"

    def batches(self) -> Iterator[FinishedBatch]:
        """Run everything; yield each batch when it has finished.

        On a GPU the next batch has been started by then, so the device computes while the caller
        works on the results. Where memory runs out, batches are halved and their prompts run
        again.

        Raises:
            ModelError: If memory does not suffice for a single prompt group.
        """
        for lookahead in self._lookaheads:
            self._make_room(lookahead)
            # The longest first: if memory does not suffice, that shows at once.
            waiting = deque(sorted(lookahead, key=lambda group: -group.longest))
            finished: FinishedBatch | None = None
            while waiting:
                batch = self._take_batch(waiting)
                try:
                    has_started = self._start(batch, lookahead)
                finally:
                    if finished is not None:
                        yield finished
                finished = None
                if has_started:
                    next_batch = self._take_batch(deque(waiting)) if self.overlaps else []
                    finished = self._finish(next_batch)
                if finished is None:
                    waiting.extendleft(reversed(batch))
                    self._halve(lookahead)
                elif not self.overlaps:
                    yield finished
                    finished = None
            if finished is not None:
                yield finished

    def _make_room(self, lookahead: Sequence[PromptGroup]) -> None:
        """Enlarge batches until every group of a lookahead fits, in slots and in rows."""
        stats = self.stats
        capacity = max(stats.capacity, self._capacity_for(lookahead))
        batch_size = max(stats.batch_size, _largest(lookahead))
        self._group_size = max(self._group_size, _largest(lookahead))
        self.stats = replace(stats, capacity=capacity, batch_size=batch_size)

    def _take_batch(self, waiting: deque[PromptGroup]) -> list[PromptGroup]:
        """Remove from ``waiting`` the first groups whose prompts fit into one batch."""
        batch: list[PromptGroup] = []
        room = self.stats.batch_size
        while waiting and (room := room - len(waiting[0].layouts)) >= 0:
            batch.append(waiting.popleft())
        return batch

    def _start(self, batch: Sequence[PromptGroup], lookahead: Sequence[PromptGroup]) -> bool:
        """Start a batch; False if the device's memory does not suffice."""
        size = BatchSize(self.stats.batch_size, self.stats.capacity, self._group_size)
        self._runner.fit(size, lookahead)
        try:
            self._runner.start(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _finish(self, next_batch: Sequence[PromptGroup]) -> FinishedBatch | None:
        """Run a batch to its end; None if the device's memory does not suffice."""
        try:
            finished = self._runner.finish(next_batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        self._count(finished)
        return finished

    def _halve(self, lookahead: Sequence[PromptGroup]) -> None:
        """Free memory and halve the batch size, but keep room for the largest group.

        Raises:
            ModelError: If batches have room for no more than that group already.
        """
        size, capacity, least = self.stats.batch_size, self.stats.capacity, _largest(lookahead)
        memory = "GPU memory" if self.overlaps else "memory"
        if size == least:
            rows = "one row" if least == 1 else f"the {least} rows of a request"
            raise ModelError(
                f"not enough {memory} for {rows} of {capacity} slots; shorten the prompts"
                + ("" if least == 1 else " or take fewer segments")
            )
        self._runner.release()
        gc.collect()
        torch.cuda.empty_cache()
        # A size far too large is halved until it can fit, without trying the sizes in between.
        smaller = max(self._rows_that_fit(size // 2, capacity), least)
        message = f"out of {memory}: {size} rows at a time become {smaller}"
        warnings.warn(message, FlexMaskWarning, stacklevel=2)
        halvings = self.stats.halvings + max(1, (size // smaller).bit_length() - 1)
        self.stats = replace(self.stats, batch_size=smaller, halvings=halvings)

    def _count(self, batch: FinishedBatch) -> None:
        stats, work = self.stats, batch.work
        is_warm, self._has_finished_a_batch = self._has_finished_a_batch, True
        warm_compilations = work.compilations if is_warm else 0
        self.stats = replace(
            stats,
            computed_tokens=stats.computed_tokens + batch.computed_tokens + work.prefix_tokens,
            prefill_s=stats.prefill_s + batch.prefill_s + work.prefix_s,
            decode_s=stats.decode_s + batch.decode_s,
            first_token_s=stats.first_token_s + batch.first_token_s,
            compilations=stats.compilations + work.compilations,
            warm_compilations=stats.warm_compilations + warm_compilations,
            mask_hits=stats.mask_hits + work.mask_hits,
            mask_misses=stats.mask_misses + work.mask_misses,
            prefill_peak_bytes=max(stats.prefill_peak_bytes, batch.prefill_peak_bytes),
            decode_peak_bytes=max(stats.decode_peak_bytes, batch.decode_peak_bytes),
        )

    def _capacity_for(self, groups: Sequence[PromptGroup]) -> int:
        longest = max((group.longest for group in groups), default=1)
        return bucketed_capacity(longest + self._max_new_tokens)


def _largest(groups: Sequence[PromptGroup]) -> int:
    return max((len(group.layouts) for group in groups), default=1)
