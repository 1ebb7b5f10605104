"""The scheduler of a run: starts prompts in free rows, and halves batches if memory runs out."""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, takewhile
from typing import TypeVar

import torch

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.batch_runner import BatchRunner, PlacedGroup
from flexmask.engine.executor import BatchSize, Executor
from flexmask.engine.memory import is_out_of_memory
from flexmask.engine.model_runner import bucketed_capacity
from flexmask.engine.prompt_group import PromptGroup
from flexmask.engine.run_options import RunOptions
from flexmask.engine.run_stats import RunStats
from flexmask.errors import FlexMaskWarning, ModelError
from flexmask.strategy import Strategy

REFILLED_PART = 8
"""One part in so many of the rows must be free before prompts are started in them.

A prefill reads all weights once, however few prompts it computes, and a decode step takes nearly
the same time whether its rows are used or not. So a few prompts at a time would cost more than the
free rows do.
"""


Result = TypeVar("Result")


class Scheduler:
    """Runs the prompts of one run in the rows of a batch.

    Within a lookahead the longest prompts start first, so prompts of similar length run together.
    Lookaheads follow each other without a break, unless the batch has to become larger.

    Attributes:
        overlaps: True if prompts are started before those that have finished are handed out.
        is_stepwise: Whether `run` yields after each decode step, with or without finished groups.
    """

    is_stepwise = False

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
        capacity = executor.kept_capacity(strategy, rows, capacity)
        self._size = BatchSize(rows, capacity, group=1)
        self._halvings = 0
        self._lookahead: Sequence[PromptGroup] = ()
        self._waiting: deque[PromptGroup] = deque()
        self._has_more = True
        self._error: Exception | None = None
        self._runner = BatchRunner(executor, strategy, tokenizer, options)
        self._rows_that_fit = executor.runner.rows_that_fit
        self.overlaps = executor.runner.device.type == "cuda"

    @property
    def stats(self) -> RunStats:
        """Counts and times of the run so far; generations are not counted here."""
        return replace(
            self._runner.stats,
            batch_size=self._size.rows,
            capacity=self._size.capacity,
            halvings=self._halvings,
        )

    def run(self) -> Iterator[Sequence[PlacedGroup]]:
        """Run everything; yield the groups that have finished, some at a time.

        On a GPU the next prompts have been started by then, so the device computes while the
        caller works on the results. Where memory runs out, batches are halved, and prompts that
        have not finished run again.

        Raises:
            ModelError: If memory does not suffice for a single prompt group.
            KVStoreError: If the folder of keys and values could not be written.
        """
        finished: Sequence[PlacedGroup] = ()
        while True:
            if (finished or self.is_stepwise) and not self.overlaps:
                yield finished
                finished = ()
            try:
                self._refill()
            finally:
                if finished or (self.is_stepwise and self.overlaps):
                    yield finished
            if self._runner.is_done and not self._waiting:
                break
            finished = self._advance()
        self._runner.flush_store()
        if self._error is not None:
            raise self._error

    @property
    def tokens_in_flight(self) -> Sequence[int]:
        """The tokens so far of the prompt that was started first, of those in flight."""
        return self._runner.tokens_in_flight

    def stop(self) -> None:
        """Start no more prompts; those in flight finish."""
        self._waiting.clear()
        self._has_more = False

    def _refill(self) -> None:
        """Start prompts in free rows, if enough of them are free."""
        runner = self._runner
        is_running = runner.has_prompts_in_flight
        if is_running and runner.free_rows < self._rows_to_refill:
            return
        self._look_ahead()
        if not self._waiting or (is_running and self._size != runner.size):
            return
        runner.fit(self._size, self._lookahead)
        groups = list(self._taken(runner.free_rows))
        if groups:
            self._try(lambda: runner.start(groups))
            runner.foresee(islice(self._waiting, self._size.rows))

    def _advance(self) -> Sequence[PlacedGroup]:
        """Decode until prompts can be started, or enough groups have finished to hand them out."""
        enough = self._rows_to_refill
        never = self._size.rows + 1
        if self._waiting:
            free = max(enough, sum(len(group.layouts) for group in self._first_together()))
        else:
            free = enough if self._has_more else never
        if self._size != self._runner.size:
            free = never
        steps = 1 if self.is_stepwise else None
        advance = self._runner.advance
        return self._try(lambda: advance(finished=enough, free=free, steps=steps)) or ()

    @property
    def _rows_to_refill(self) -> int:
        return -(-self._size.rows // REFILLED_PART)

    def _look_ahead(self) -> None:
        """Take the next lookahead if no group is waiting, and make the batch large enough for it.

        An error of the requests is raised once the prompts in flight have finished.
        """
        while not self._waiting and self._has_more:
            try:
                lookahead = next(self._lookaheads, None)
            except Exception as error:
                self._error, lookahead = error, None
            if lookahead is None:
                self._has_more = False
                return
            # The longest first: if memory does not suffice, that shows at once.
            self._waiting.extend(sorted(lookahead, key=lambda group: -group.longest))
            self._lookahead, size, largest = lookahead, self._size, _largest(lookahead)
            self._size = BatchSize(
                rows=max(size.rows, largest),
                capacity=max(size.capacity, self._capacity_for(lookahead)),
                group=max(size.group, largest),
            )

    def _taken(self, room: int) -> Iterator[PromptGroup]:
        """Remove the first waiting groups whose prompts fit into ``room`` rows."""
        while self._waiting:
            together = self._first_together()
            room -= sum(len(group.layouts) for group in together)
            if room < 0:
                return
            for _ in together:
                yield self._waiting.popleft()

    def _first_together(self) -> list[PromptGroup]:
        """Return the first waiting group, and the other samples of its request.

        They start together, as many as the batch has rows for, so that their prompts are computed
        once.
        """
        first = self._waiting[0]
        room = self._size.rows // len(first.layouts)
        samples = takewhile(lambda group: group.layouts is first.layouts, self._waiting)
        return list(islice(samples, room))

    def _try(self, work: Callable[[], Result]) -> Result | None:
        """Do something with the runner; halve the batch and return None if memory runs out."""
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, because the error holds the tensors of its frames.
        self._halve()
        return None

    def _halve(self) -> None:
        """Free memory and halve the batch size, but keep room for the largest group.

        Raises:
            ModelError: If batches have room for no more than that group already.
        """
        self._waiting.extendleft(reversed(self._runner.release()))
        size, capacity, least = self._size.rows, self._size.capacity, _largest(self._waiting)
        memory = "GPU memory" if self.overlaps else "memory"
        if size == least:
            rows = "one row" if least == 1 else f"the {least} rows of a request"
            raise ModelError(
                f"not enough {memory} for {rows} of {capacity} slots; shorten the prompts"
                + ("" if least == 1 else " or take fewer segments")
            )
        gc.collect()
        torch.cuda.empty_cache()
        # A size far too large is halved until it can fit, without trying the sizes in between.
        smaller = max(self._rows_that_fit(size // 2, capacity), least)
        message = f"out of {memory}: {size} rows at a time become {smaller}"
        warnings.warn(message, FlexMaskWarning, stacklevel=2)
        self._halvings += max(1, (size // smaller).bit_length() - 1)
        self._size = replace(self._size, rows=smaller)

    def _capacity_for(self, groups: Sequence[PromptGroup]) -> int:
        longest = max((group.longest for group in groups), default=1)
        return bucketed_capacity(longest + self._max_new_tokens)


def _largest(groups: Iterable[PromptGroup]) -> int:
    return max((len(group.layouts) for group in groups), default=1)
