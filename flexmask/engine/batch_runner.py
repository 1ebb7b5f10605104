"""Runs a batch: prompts start in free rows and end while the other rows go on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import torch

from flexmask.device_clock import DeviceClock, Mark
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.batch_row import BatchRow
from flexmask.engine.decode_loop import ChosenTokens, DecodeLoop
from flexmask.engine.executor import BatchSize, Executor
from flexmask.engine.prefix_cache import common_prefix_length, pays_off
from flexmask.engine.prompt_group import PromptGroup
from flexmask.engine.run_options import RunOptions
from flexmask.engine.run_stats import RunStats
from flexmask.engine.turns import TURN
from flexmask.errors import ModelError
from flexmask.layout import Layout
from flexmask.strategy import Strategy
from flexmask.torch_internals import compiled_graphs

LAG = 2
"""Steps that a GPU runs ahead of the host, which checks whether rows have ended."""

STEPS_AHEAD = 4
"""Steps before its last token by which a row counts as free on a GPU.

They are queued before the next prompts are planned, so that the device computes meanwhile.
"""


FORESEEN_TOGETHER = 16
"""Prompts that are looked at together while the device works; that takes a few milliseconds."""


@dataclass(frozen=True)
class PlacedGroup:
    """A prompt group and the batch rows of its prompts."""

    group: PromptGroup
    rows: Sequence[BatchRow]

    @property
    def is_complete(self) -> bool:
        """True if none of its rows takes more tokens."""
        return all(row.is_complete for row in self.rows)


class _Occupant(NamedTuple):
    """The prompt in a batch row.

    Attributes:
        row: Takes its tokens.
        prompt_tokens: Slots of the prompt.
        last_step: Number of the step that computes its last possible token.
    """

    row: BatchRow
    prompt_tokens: int
    last_step: int


@dataclass(frozen=True)
class _Prefill:
    """The times of a prefill.

    Attributes:
        started: Time of the host's clock when it was asked for.
        marks: Marks of the device's clock before and after it.
    """

    started: float
    marks: tuple[Mark, Mark]


@dataclass(frozen=True)
class _QueuedStep:
    """A decode step that is queued on the device.

    Attributes:
        tokens: The tokens; they are there once the second mark is reached.
        occupants: The prompts whose tokens it computes, by batch row.
        marks: Marks of the device's clock before and after it.
        prefill: The prefill right before it.
    """

    tokens: ChosenTokens
    occupants: Mapping[int, _Occupant]
    marks: tuple[Mark, Mark]
    prefill: _Prefill | None


class BatchRunner:
    """Runs the prompts of one run in the rows of a batch, on an executor that other runs use too.

    A row is free once its prompt has ended, or its last possible token is queued; then the next
    prompt can be started in it. Each queued step notes whose tokens it computes.

    Each method takes its turn. Where another run's turn comes while prompts are in flight, that
    run finishes them for this one; where another has prepared the executor since, `start` prepares
    it again. So results are those of a run alone.

    Attributes:
        size: The size of the batch; `fit` sets it.
        stats: Work and times so far.
    """

    def __init__(
        self,
        executor: Executor,
        strategy: Strategy,
        tokenizer: RequestTokenizer,
        options: RunOptions,
    ) -> None:
        """Store what batches need; the executor is prepared by the first `start`."""
        self._executor = executor
        self._strategy = strategy
        self._tokenizer = tokenizer
        self._options = options
        self._device = executor.runner.device
        self._clock = DeviceClock(self._device)
        self.size = BatchSize(0, 0, 0)
        self.stats = RunStats(batch_size=0, capacity=0)
        on_gpu = self._device.type == "cuda"
        self._lag, self._steps_ahead = (LAG, STEPS_AHEAD) if on_gpu else (0, 0)
        self._lookahead: Sequence[PromptGroup] = ()
        self._loop: DecodeLoop | None = None
        self._occupants: Mapping[int, _Occupant] = {}
        self._num_steps = 0
        self._keys_read_once = 0
        self._queued: deque[_QueuedStep] = deque()
        self._in_flight: list[PlacedGroup] = []
        self._finished: list[PlacedGroup] = []
        self._cold: set[int] = set()
        self._foreseen: deque[PromptGroup] = deque()
        self._known: set[int] = set()
        self._is_warm = False
        self._error: Exception | None = None

    @property
    def has_prompts_in_flight(self) -> bool:
        """True if prompts have been started and not finished."""
        return bool(self._in_flight)

    @property
    def is_done(self) -> bool:
        """True if no prompts are in flight, and `advance` has returned all that have finished."""
        return not (self._in_flight or self._finished)

    @property
    def free_rows(self) -> int:
        """Rows in which the next prompts can be started."""
        beyond = self._num_steps + self._steps_ahead
        return self.size.rows - sum(one.last_step > beyond for one in self._occupants.values())

    def fit(self, size: BatchSize, lookahead: Sequence[PromptGroup]) -> None:
        """Set what `start` prepares the executor for.

        Args:
            size: The size of the batch; another one only where no prompts are in flight.
            lookahead: The next prompts, in which a common prefix is looked for.
        """
        if size != self.size:
            assert not self._in_flight, "the batch has another size"
            self._loop = None
        self.size, self._lookahead = size, lookahead

    def foresee(self, groups: Iterable[PromptGroup]) -> None:
        """Name prompts that will be started soon, in this order.

        While the device works, the host finds the tiles of their masks and proves what can be
        shared. The plan that is made when rows are free then finds that in its caches.
        """
        self._foreseen = deque(group for group in groups if group.number not in self._known)

    def release(self) -> list[PromptGroup]:
        """Free what the executor holds for batches of this size, after memory has run out.

        Returns:
            The groups that were given to `start` and have not finished.
        """
        with TURN:
            self._executor.occupancy.admit(self)
            while self._queued:
                self._read_step()
            self._executor.release()
            unfinished = [placed.group for placed in self._in_flight]
            self._in_flight, self._occupants = [], {}
            self._error = self._loop = None
        return unfinished

    def start(self, groups: Sequence[PromptGroup]) -> None:
        """Start prompts in free rows; on a GPU, the work is queued when this returns.

        Args:
            groups: The prompts, at most as many as there are free rows.

        Raises:
            torch.cuda.OutOfMemoryError: If the device's memory does not suffice. Then `release`
                returns them.
        """
        started = time.perf_counter()
        placed = [PlacedGroup(group, [self._new_row() for _ in group.layouts]) for group in groups]
        with TURN:
            self._executor.occupancy.admit(self)
            self._in_flight += placed
            self._raise_error()
            with self._counting():
                if self._loop is None:
                    self._loop = self._prepare()
                self._start(placed, self._loop, started)

    @property
    def tokens_in_flight(self) -> Sequence[int]:
        """The tokens so far of the prompt that was started first, of those in flight."""
        return tuple(self._in_flight[0].rows[0].token_ids) if self._in_flight else ()

    def advance(self, finished: int, free: int, steps: int | None = None) -> list[PlacedGroup]:
        """Decode until enough prompts have finished or enough rows are free, or all have finished.

        Args:
            finished: Prompts that are enough.
            free: Free rows that are enough.
            steps: Decode steps that are enough; None for any number.

        Returns:
            The groups that have finished since the last call.

        Raises:
            torch.cuda.OutOfMemoryError: If the device's memory does not suffice.
            ModelError: If another run was to finish prompts of this one, and was interrupted.
        """
        before = self.stats.decode_steps

        def is_enough() -> bool:
            if steps is not None and self.stats.decode_steps - before >= steps:
                return True
            if sum(len(placed.rows) for placed in self._finished) >= finished:
                return True
            return len(self._queued) <= self._lag and self.free_rows >= free

        with TURN:
            self._decode_until(is_enough)
            self._is_warm = True
            found, self._finished = self._finished, []
            if not found:
                self._raise_error()
        return found

    def flush_store(self) -> None:
        """Wait until the store's folder has all spans that were kept.

        Raises:
            KVStoreError: If it could not be written.
        """
        store = self._executor.runner.store
        if store is not None:
            store.flush()

    def settle(self) -> None:
        """Finish all prompts in flight, for `advance` to return; another run calls this."""
        try:
            self._decode_until(lambda: False)
        finally:
            self._loop = None

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _decode_until(self, is_enough: Callable[[], bool]) -> None:
        """Decode; an error is kept, so that groups that have finished are returned before it."""
        if self._error is not None:
            return
        # The error if this is interrupted, perhaps in another run's turn.
        self._error = ModelError(
            "another run of this engine was interrupted while it finished prompts of this one; "
            "run these requests again"
        )
        try:
            with self._counting(), self._peak_bytes("decode_peak_bytes"):
                while self._in_flight and not is_enough():
                    while len(self._queued) <= self._lag and self._occupants:
                        self._queue_step()
                    while self._foreseen and not self._clock.has_passed(self._queued[0].marks[1]):
                        self._look_at_foreseen()
                    self._read_step()
            self._error = None
        except Exception as error:  # raised where the run itself goes on
            self._error = error

    def _prepare(self) -> DecodeLoop:
        """Prepare the executor, and compute the prefix that the prompts of the lookahead share."""
        size, runner = self.size, self._executor.runner
        before = self._clock.mark()
        loop = self._executor.prepare(self._strategy, size, self._options)
        runner.forget_prefix()
        layouts = [layout for group in self._lookahead for layout in group.layouts]
        length = common_prefix_length(layouts)
        pays = length > 0 and pays_off(layouts, length, size.rows)
        if pays and (plan := runner.cache_prefix(layouts[0], length)) is not None:
            self._count(**plan.work)
        self._keys_read_once = length if runner.reads_key_table else 0
        with self._executor.ranks.waiting():
            self._count(prefill_s=self._clock.seconds(before, self._clock.mark()))
        return loop

    def _start(self, groups: Sequence[PlacedGroup], loop: DecodeLoop, started: float) -> None:
        runner = self._executor.runner
        layouts = [layout for placed in groups for layout in placed.group.layouts]
        self._known.difference_update(placed.group.number for placed in groups)
        rows = self._next_rows(len(layouts))
        # Until the rows are free; the device works on these steps while the host plans.
        while any(row in self._occupants for row in rows):
            self._queue_step()
        prompts = dict(zip(rows, layouts, strict=True))
        plan = runner.plan(prompts, self._options.max_new_tokens)
        last_step = self._num_steps + self._options.max_new_tokens
        started_rows = [row for placed in groups for row in placed.rows]
        occupants = {
            index: _Occupant(row, len(layout), last_step)
            for index, row, layout in zip(rows, started_rows, layouts, strict=True)
        }
        self._occupants = {**self._occupants, **occupants}
        rest = iter(rows)
        loop.load(
            rows,
            [layout.token_ids for layout in layouts],
            [seed for placed in groups for seed in placed.group.seeds],
            [(list(islice(rest, len(p.rows))), p.group.weights) for p in groups],
        )
        before = self._clock.mark()
        with self._peak_bytes("prefill_peak_bytes"):
            runner.prefill(plan)
        prefill = _Prefill(started, (before, self._clock.mark()))
        with self._peak_bytes("decode_peak_bytes"):
            self._queue_step(prefill)
        self._count(prefills=1, copied_tokens=plan.copied_tokens, **plan.work)

    def _look_at_foreseen(self) -> None:
        """Plan some of the foreseen prompts, for what the planner remembers of them."""
        layouts: list[Layout] = []
        while self._foreseen and len(layouts) < FORESEEN_TOGETHER:
            group = self._foreseen.popleft()
            self._known.add(group.number)
            layouts += group.layouts
        self._executor.runner.foresee(layouts, self._options.max_new_tokens)

    def _new_row(self) -> BatchRow:
        options = self._options
        eos_token_ids = options.rules.eos_token_ids
        return BatchRow(self._tokenizer, options.max_new_tokens, options.stop, eos_token_ids)

    def _next_rows(self, count: int) -> list[int]:
        """Choose the rows that are free, then those that will be free first."""
        occupants = self._occupants
        free = (row for row in range(self.size.rows) if row not in occupants)
        others = sorted(occupants, key=lambda row: occupants[row].last_step)
        return list(islice(chain(free, others), count))

    def _queue_step(self, prefill: _Prefill | None = None) -> None:
        assert self._loop is not None
        before = self._clock.mark()
        tokens = self._loop.step()
        marks = (before, self._clock.mark())
        self._queued.append(_QueuedStep(tokens, self._occupants, marks, prefill))
        self._num_steps += 1
        self._free_rows()

    def _read_step(self) -> None:
        """Wait for the tokens of the step that was queued first, and give them to its rows."""
        step = self._queued.popleft()
        with self._executor.ranks.waiting():
            decode_s = self._clock.seconds(*step.marks)
            token_ids, *scores = (None if one is None else one.tolist() for one in step.tokens)
        unfinished = 0
        has_ended = False
        assert token_ids is not None
        logprobs, most_likely = scores
        keys = 0
        for index, (row, prompt_tokens, _) in step.occupants.items():
            if not row.is_complete:
                keys += prompt_tokens + len(row.token_ids)
                row.append(token_ids[index][0])
                if logprobs is not None and most_likely is not None:
                    row.add_logprobs(logprobs[index], most_likely[index])
                unfinished += 1
                has_ended |= row.is_complete
        keys -= max(0, unfinished - 1) * self._keys_read_once
        self._count(
            decode_steps=1,
            row_steps=len(token_ids),
            used_row_steps=unfinished,
            keys_read=keys,
            decode_s=decode_s,
        )
        if step.prefill is not None:
            prefill_s = self._clock.seconds(*step.prefill.marks)
            first_token_s = time.perf_counter() - step.prefill.started
            self._count(prefill_s=prefill_s, first_token_s=first_token_s)
        if has_ended:
            self._free_rows()
            self._finished += [placed for placed in self._in_flight if placed.is_complete]
            self._in_flight = [placed for placed in self._in_flight if not placed.is_complete]
            self._note_cold_groups()

    def _free_rows(self) -> None:
        """Free the rows whose prompt has ended, or has its last possible token queued."""
        self._occupants = {
            index: one
            for index, one in self._occupants.items()
            if one.last_step > self._num_steps and not one.row.is_complete
        }

    def _count(self, **added: float) -> None:
        sums: dict[str, Any] = {n: getattr(self.stats, n) + value for n, value in added.items()}
        self.stats = replace(self.stats, **sums)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count the graphs compiled and the masks built meanwhile, which are this run's."""
        compiled, masks = compiled_graphs(), self._executor.mask_cache.stats
        try:
            yield
        finally:
            later, new = self._executor.mask_cache.stats, compiled_graphs() - compiled
            self._count(
                compilations=new,
                warm_compilations=new if self._is_warm else 0,
                mask_hits=later.hits - masks.hits,
                mask_misses=later.misses - masks.misses,
            )
            if new or not self._is_warm:
                self._cold = {placed.group.number for placed in self._in_flight}
                self._note_cold_groups()

    def _note_cold_groups(self) -> None:
        self._cold &= {placed.group.number for placed in self._in_flight}
        self.stats = replace(self.stats, cold_groups=len(self._cold))

    @contextmanager
    def _peak_bytes(
        self, name: Literal["prefill_peak_bytes", "decode_peak_bytes"]
    ) -> Iterator[None]:
        """Note the most memory that a phase allocates, which is when its work is queued."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        # Nested, because flattening the statistics takes longer than planning a prompt.
        allocated = torch.cuda.memory_stats_as_nested_dict(self._device)["allocated_bytes"]
        peak = allocated["all"]["peak"]
        most: dict[str, Any] = {name: max(getattr(self.stats, name), peak)}
        self.stats = replace(self.stats, **most)
