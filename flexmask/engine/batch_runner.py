"""Runs one batch in two halves; between them the host is free while a GPU computes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch

from flexmask.device_clock import DeviceClock, Mark
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.batch_row import BatchRow
from flexmask.engine.decode_loop import DecodeLoop
from flexmask.engine.executor import BatchSize, Executor
from flexmask.engine.prefill_plan import PrefillPlan
from flexmask.engine.prefix_cache import common_prefix_length, pays_off
from flexmask.engine.prompt_group import PromptGroup
from flexmask.engine.row_processors import RowProcessors
from flexmask.engine.run_options import RunOptions
from flexmask.engine.turns import TURN
from flexmask.errors import ModelError
from flexmask.strategy import Strategy
from flexmask.torch_internals import compiled_graphs


@dataclass(frozen=True)
class RunningBatch:
    """A batch between its two halves.

    Attributes:
        groups: The prompt groups in it, in the order of its rows.
        computed_tokens: Tokens that its prefill computes.
        steps: The next token of each row, step by step.
        started: Time of the host's clock when the batch was started.
        marks: Marks of the device's clock before prefill and before decoding.
        peak_bytes: Most device memory in use so far, during prefill and during decoding.
    """

    groups: Sequence[PromptGroup]
    computed_tokens: int
    steps: Iterator[list[int]]
    started: float
    marks: tuple[Mark, Mark]
    peak_bytes: list[int]


@dataclass(frozen=True)
class WorkCounts:
    """Work of a run that is not part of any of its batches.

    Attributes:
        prefix_tokens: Tokens computed for the prefix cache.
        prefix_s: Seconds of computing them.
        compilations: Graphs compiled.
        mask_hits: BlockMasks found in the cache.
        mask_misses: BlockMasks built.
    """

    prefix_tokens: int = 0
    prefix_s: float = 0.0
    compilations: int = 0
    mask_hits: int = 0
    mask_misses: int = 0


@dataclass(frozen=True)
class FinishedBatch:
    """The tokens of a batch and its costs.

    Attributes:
        rows: Each prompt group with its batch rows, in the order of the batch.
        computed_tokens: Tokens that its prefill computed.
        prefill_s: Seconds of prefill.
        decode_s: Seconds of decoding.
        first_token_s: Seconds from its start until its first tokens reached the host.
        prefill_peak_bytes: Most device memory in use during prefill; 0 on a CPU.
        decode_peak_bytes: The same during decoding.
        work: Other work since the batch before it finished.
    """

    rows: Sequence[tuple[PromptGroup, Sequence[BatchRow]]]
    computed_tokens: int
    prefill_s: float
    decode_s: float
    first_token_s: float
    prefill_peak_bytes: int
    decode_peak_bytes: int
    work: WorkCounts = WorkCounts()


class BatchRunner:
    """Runs the batches of one run on an executor that other runs use too.

    Each method takes its turn. Where another run's turn comes between the start and the end of a
    batch, that run finishes the batch for this one; where another has prepared the executor since,
    `start` prepares it again. So results are those of a run alone.
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
        self._work = WorkCounts()
        self._size: BatchSize | None = None
        self._lookahead: Sequence[PromptGroup] = ()
        self._planned: tuple[Sequence[PromptGroup], PrefillPlan] | None = None
        self._loop: DecodeLoop | None = None
        self._running: RunningBatch | None = None
        self._outcome: FinishedBatch | Exception | None = None

    def fit(self, size: BatchSize, lookahead: Sequence[PromptGroup]) -> None:
        """Set what `start` prepares the executor for.

        Args:
            size: The size of batches.
            lookahead: Prompts of this batch and the next ones, in which a common prefix is looked
                for.
        """
        if size != self._size:
            self._forget()
        self._size, self._lookahead = size, lookahead

    def release(self) -> None:
        """Free what the executor holds for batches of this size."""
        with TURN:
            self._executor.occupancy.admit(self)
            self._forget()
            self._executor.release()

    def start(self, groups: Sequence[PromptGroup]) -> None:
        """Start a batch; on a GPU, prefill and the first steps are queued when this returns.

        Args:
            groups: Its prompts, at most as many as `fit` was told.

        Raises:
            torch.cuda.OutOfMemoryError: If the device's memory does not suffice.
        """
        with TURN:
            self._executor.occupancy.admit(self)
            with self._counting():
                if self._loop is None:
                    self._loop = self._prepare()
                self._running = self._start(groups, self._loop)

    def finish(self, next_groups: Sequence[PromptGroup] = ()) -> FinishedBatch:
        """Run the batch that was started until all of its rows have ended.

        Args:
            next_groups: The batch after it, which is planned while the device computes this one.

        Raises:
            torch.cuda.OutOfMemoryError: If the device's memory does not suffice.
            ModelError: If another run was to finish the batch, and was interrupted.
        """
        with TURN:
            if self._running is not None:
                self._finish(self._running, next_groups)
            outcome, self._outcome = self._outcome, None
            assert outcome is not None, "start comes first"
            if isinstance(outcome, Exception):
                raise outcome
            work, self._work = self._work, WorkCounts()
        return replace(outcome, work=work)

    def settle(self) -> None:
        """Finish the running batch, for `finish` to return; another run calls this in its turn."""
        self._forget()
        if self._running is not None:
            self._finish(self._running)

    def _forget(self) -> None:
        self._loop = self._planned = None

    def _prepare(self) -> DecodeLoop:
        """Prepare the executor, and compute the prefix that the prompts of the lookahead share."""
        size, runner = self._size, self._executor.runner
        assert size is not None, "fit comes first"
        before = self._clock.mark()
        loop = self._executor.prepare(self._strategy, size, self._options)
        runner.cached_prefix = None
        layouts = [layout for group in self._lookahead for layout in group.layouts]
        length = common_prefix_length(layouts)
        pays = length > 0 and pays_off(layouts, length, size.rows)
        computed = length if pays and runner.cache_prefix(layouts[0], length) else 0
        seconds = self._clock.seconds(before, self._clock.mark())
        self._work = replace(
            self._work,
            prefix_tokens=self._work.prefix_tokens + computed,
            prefix_s=self._work.prefix_s + seconds,
        )
        return loop

    def _plan(self, groups: Sequence[PromptGroup]) -> PrefillPlan:
        """Plan the prefill of a batch, unless that has been done already."""
        if self._planned is None or self._planned[0] != groups:
            layouts = [layout for group in groups for layout in group.layouts]
            self._planned = (
                groups,
                self._executor.runner.plan(dict(enumerate(layouts)), self._options.max_new_tokens),
            )
        return self._planned[1]

    def _start(self, groups: Sequence[PromptGroup], loop: DecodeLoop) -> RunningBatch:
        started = time.perf_counter()
        assert self._size is not None
        plan = self._plan(groups)
        seeds = [seed for group in groups for seed in group.seeds]
        spare = self._size.rows - len(seeds)  # a constant number of rows compiles once
        layouts = [layout for group in groups for layout in group.layouts]
        last = [layout.token_ids[-1] for layout in layouts] + [0] * spare
        seeds_of_rows = [*seeds, *seeds[-1:] * spare]
        weights_of_groups = [*[group.weights for group in groups], *[(1.0,)] * spare]
        loop.load(last, seeds_of_rows, weights_of_groups, self._processors(groups))
        peaks = [0, 0]
        before = self._clock.mark()
        with self._peak_bytes(peaks, 0):
            self._executor.runner.prefill(plan)
        prefilled = self._clock.mark()
        with self._peak_bytes(peaks, 1):
            steps = loop.run()
        return RunningBatch(
            groups, plan.computed_tokens, steps, started, (before, prefilled), peaks
        )

    def _processors(self, groups: Sequence[PromptGroup]) -> RowProcessors | None:
        rules, max_new_tokens = self._options.rules, self._options.max_new_tokens
        if not rules.applied:
            return None
        prompts = [layout.token_ids for group in groups for layout in group.layouts]
        return RowProcessors(rules, prompts, max_new_tokens, self._device)

    def _finish(self, batch: RunningBatch, next_groups: Sequence[PromptGroup] = ()) -> None:
        """Store the finished batch, or the error that ended it, as the outcome."""
        self._running = None
        # The outcome if this is interrupted in another run's turn.
        self._outcome = ModelError(
            "another run of this engine was interrupted while it finished a batch of this one; "
            "run these requests again"
        )
        try:
            with self._counting():
                if next_groups:
                    self._plan(next_groups)
                self._outcome = self._read(batch)
        except Exception as error:  # raised where the run itself goes on
            self._outcome = error

    def _read(self, batch: RunningBatch) -> FinishedBatch:
        options = self._options
        eos_token_ids = options.rules.eos_token_ids
        rows = [
            BatchRow(self._tokenizer, options.max_new_tokens, options.stop, eos_token_ids)
            for group in batch.groups
            for _ in group.layouts
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
        prefill_peak_bytes, decode_peak_bytes = batch.peak_bytes
        rest = iter(rows)
        return FinishedBatch(
            rows=[(group, list(islice(rest, len(group.layouts)))) for group in batch.groups],
            computed_tokens=batch.computed_tokens,
            prefill_s=self._clock.seconds(*marks[:2]),
            decode_s=self._clock.seconds(*marks[1:]),
            first_token_s=first_token_s,
            prefill_peak_bytes=prefill_peak_bytes,
            decode_peak_bytes=decode_peak_bytes,
        )

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count the graphs compiled and the masks built meanwhile, which are this run's."""
        compiled, masks = compiled_graphs(), self._executor.mask_cache.stats
        try:
            yield
        finally:
            work, later = self._work, self._executor.mask_cache.stats
            self._work = replace(
                work,
                compilations=work.compilations + compiled_graphs() - compiled,
                mask_hits=work.mask_hits + later.hits - masks.hits,
                mask_misses=work.mask_misses + later.misses - masks.misses,
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
