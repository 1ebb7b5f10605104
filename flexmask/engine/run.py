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
from flexmask.engine.model_runner import bucketed_capacity, compilations
from flexmask.engine.prefix_reuse import pays_off, shared_beginning
from flexmask.engine.prompts import Job
from flexmask.engine.sampling import Sampling
from flexmask.errors import FlexMaskWarning, ModelError
from flexmask.fusion import Fusion, majority
from flexmask.generation import FinishReason, Generation
from flexmask.layout import Layout
from flexmask.request import Request
from flexmask.strategy import Strategy
from flexmask.tokenization import RequestTokenizer

if TYPE_CHECKING:
    from flexmask.engine.engine import Engine


@dataclass(frozen=True)
class RunStats:
    """What a run has done so far.

    Attributes:
        batch_size: Prompts that run together.
        capacity: Slots of the key-value cache for each.
        rows: Generations finished.
        prompt_tokens: Slots of their prompts, copies of the prefix counted.
        computed_tokens: Those that prefill computed; the others begin as all prompts do, and
            were copied.
        generated_tokens: Their tokens; one that several prompts share counts once.
        prefill_s: Seconds in prefill, compilation included.
        decode_s: Seconds in decode, compilation included.
        first_token_s: Seconds from the start of each batch until its first tokens, summed.
        compilations: Graphs compiled in the run.
        warm_compilations: Those of them compiled after the first batch.
        mask_hits: BlockMasks found in the cache.
        mask_misses: BlockMasks built.
        prefill_peak_bytes: Most device memory in use during prefill; 0 on CPU.
        decode_peak_bytes: The same during decode.
        halvings: How often memory did not suffice and batches became half as large.
    """

    batch_size: int
    capacity: int
    rows: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    compilations: int = 0
    warm_compilations: int = 0
    mask_hits: int = 0
    mask_misses: int = 0
    prefill_peak_bytes: int = 0
    decode_peak_bytes: int = 0
    halvings: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of prefill and decode."""
        seconds = self.prefill_s + self.decode_s
        return self.generated_tokens / seconds if seconds else 0.0


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
        self._first_tokens_at = 0.0
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
        compiled_by_first_batch = None
        for window in self._windows:
            self._make_room(window)
            # The longest first: where memory does not suffice, that shows at once.
            todo = deque(sorted(window, key=lambda job: -job.longest))
            while todo:
                batch = self._take_batch(todo)
                finished = self._attempt(batch, window)
                if finished is None:
                    todo.extendleft(reversed(batch))
                    self._halve(window)
                    continue
                if compiled_by_first_batch is None:
                    compiled_by_first_batch = compilations()
                self._count(list(finished.values()), compiled_by_first_batch)
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

    def _attempt(
        self, batch: Sequence[Job], window: Sequence[Job]
    ) -> dict[int, Generation] | None:
        """Run a batch; None if the device's memory does not suffice."""
        try:
            if not self._is_ready:
                self._make_ready(window)
            return self._run_batch(batch)
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
        runner.shared_prefix = None
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

    def _run_batch(self, jobs: Sequence[Job]) -> dict[int, Generation]:
        layouts = [layout for job in jobs for layout in job.layouts]
        spare = self.stats.batch_size - len(layouts)
        padded = [*layouts, *layouts[-1:] * spare]  # a constant number of rows compiles once
        runner, started = self._engine.runner, time.perf_counter()
        with self._peak_bytes("prefill_peak_bytes"):
            runner.prefill(padded)
        prefilled = time.perf_counter()
        with self._peak_bytes("decode_peak_bytes"):
            rows = self._decode(jobs, padded)
        self.stats = replace(
            self.stats,
            computed_tokens=self.stats.computed_tokens
            + sum(runner.computed_tokens[: len(layouts)]),
            prefill_s=self.stats.prefill_s + prefilled - started,
            decode_s=self.stats.decode_s + time.perf_counter() - prefilled,
            first_token_s=self.stats.first_token_s + self._first_tokens_at - started,
        )
        unread = iter(rows)
        rows_of = {job.number: list(islice(unread, len(job.layouts))) for job in jobs}
        by_number = sorted(jobs, key=attrgetter("number"))
        return {job.number: self._generation(job, rows_of[job.number]) for job in by_number}

    def _decode(self, jobs: Sequence[Job], padded: Sequence[Layout]) -> list[_Row]:
        seeds = [seed for job in jobs for seed in job.seeds]
        groups = [self._options.fusion.weights_of(job.request) for job in jobs]
        spare = len(padded) - len(seeds)
        last = [layout.token_ids[-1] for layout in padded]
        rows = [_Row(self._options, self._engine.eos_token_ids()) for _ in seeds]
        assert self._loop is not None
        steps = self._loop.run(last, [*seeds, *seeds[-1:] * spare], [*groups, *[(1.0,)] * spare])
        for number, token_ids in enumerate(steps):
            if number == 0:
                self._first_tokens_at = time.perf_counter()
            for row, token_id in zip(rows, token_ids[: len(rows)], strict=True):
                row.append(token_id, self._tokenizer)
            if all(row.finish_reason for row in rows):
                break
        return rows

    def _generation(self, job: Job, rows: Sequence[_Row]) -> Generation:
        """What the rows of a job come to: the same in all of them, or the answer of most."""
        request, prompt_tokens = job.request, sum(map(len, job.layouts))
        generations = [row.generation(request, prompt_tokens, self._tokenizer) for row in rows]
        if self._options.fusion.name != "vote":
            return generations[0]
        return generations[majority([*map(self._options.answer_of, generations)])]

    def _count(self, generations: Sequence[Generation], compiled_by_first_batch: int) -> None:
        stats = self.stats
        (cache_before, compiled), cache = self._counted_from, self._engine.mask_cache.stats
        self.stats = replace(
            stats,
            rows=stats.rows + len(generations),
            prompt_tokens=stats.prompt_tokens + sum(g.prompt_tokens for g in generations),
            generated_tokens=stats.generated_tokens + sum(len(g.token_ids) for g in generations),
            compilations=compilations() - compiled,
            warm_compilations=compilations() - compiled_by_first_batch,
            mask_hits=cache.hits - cache_before.hits,
            mask_misses=cache.misses - cache_before.misses,
        )

    def _capacity_for(self, jobs: Sequence[Job]) -> int:
        longest = max((job.longest for job in jobs), default=1)
        return bucketed_capacity(longest + self._options.max_new_tokens)

    @contextmanager
    def _peak_bytes(self, name: str) -> Iterator[None]:
        """Note the most memory in use during a phase, and wait for its end."""
        device = self._engine.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield
        self._synchronize()
        if device.type == "cuda":
            peak = max(getattr(self.stats, name), torch.cuda.max_memory_allocated(device))
            self.stats = replace(self.stats, **{name: peak})

    def _synchronize(self) -> None:
        if self._engine.model.device.type == "cuda":
            torch.cuda.synchronize(self._engine.model.device)


class _Row:
    """The tokens generated for one prompt, and whether they are complete."""

    def __init__(self, options: RunOptions, eos_token_ids: frozenset[int]) -> None:
        self._options = options
        self._eos_token_ids = eos_token_ids
        self._token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    def append(self, token_id: int, tokenizer: RequestTokenizer) -> None:
        if self.finish_reason:
            return
        self._token_ids.append(token_id)
        if token_id in self._eos_token_ids:
            self.finish_reason = "eos"
        elif self._stop_index(self._text(tokenizer) if self._options.stop else "") is not None:
            self.finish_reason = "stop"
        elif len(self._token_ids) == self._options.max_new_tokens:
            self.finish_reason = "length"

    def generation(
        self, request: Request, prompt_tokens: int, tokenizer: RequestTokenizer
    ) -> Generation:
        assert self.finish_reason is not None
        text = self._text(tokenizer)
        return Generation(
            request=request,
            text=text[: self._stop_index(text)],
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=prompt_tokens,
        )

    def _text(self, tokenizer: RequestTokenizer) -> str:
        ended = self.finish_reason == "eos"
        return tokenizer.decode(tuple(self._token_ids[:-1] if ended else self._token_ids))

    def _stop_index(self, text: str) -> int | None:
        found = [index for stop in self._options.stop if (index := text.find(stop)) >= 0]
        return min(found, default=None)


def _largest(jobs: Sequence[Job]) -> int:
    return max((len(job.layouts) for job in jobs), default=1)
