"""A precomputing run: the spans of requests, of one `Engine.precompute` call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from flexmask.engine.executor import Executor
from flexmask.engine.model_runner import ModelRunner
from flexmask.engine.ordered_run import OrderedRun
from flexmask.engine.prefill_batches import PrefillBatches
from flexmask.engine.prefill_plan import PrefillPlan
from flexmask.engine.prompt_planner import PlannedRequest
from flexmask.engine.prompt_spans import SpanFinder
from flexmask.engine.run_stats import RunStats
from flexmask.engine.span_sharing import PromptSpans, known_spans
from flexmask.errors import KVStoreError
from flexmask.kv_store.counters import FolderCounters
from flexmask.kv_store.store import KVStore
from flexmask.layout import Layout
from flexmask.request import Request
from flexmask.strategy import Strategy


class SpanComputer(PrefillBatches[PromptSpans, None]):
    """Computes the spans that prompts want, and gives them to a store.

    Keys and values round as the other tokens of their batch make matrix products round. So a
    batch of which the store lacks a span is computed whole, as if the store had none of its spans,
    and a span has the same bytes whatever the store had before.

    Attributes:
        found: Identities of the spans that prompts wanted and the store had.
    """

    def __init__(
        self, executor: Executor, strategy: Strategy, batch_size: int | None, store: KVStore
    ) -> None:
        """Store what batches need; the executor is prepared by the first one.

        Args:
            executor: Executes the batches.
            strategy: The mask strategy.
            batch_size: Prompts that run together; None to choose.
            store: The executor's store.
        """
        super().__init__(executor, strategy, batch_size)
        self.found: set[bytes] = set()
        self._store = store

    def _layout_of(self, prompt: PromptSpans) -> Layout:
        return prompt.layout

    def _batch(
        self,
        prompts: Sequence[PromptSpans],
        rows: int,
        capacity: int,
        upcoming: Sequence[Layout],
    ) -> list[None]:
        """Run one batch, unless the store has all spans that its prompts want."""
        wanted = {prompt.identities[index] for prompt in prompts for index in prompt.wanted or ()}
        found = {identity for identity in wanted if self._store.use(identity)}
        self.found |= found
        if found == wanted:
            return [None] * len(prompts)
        together = [
            replace(
                prompt,
                row=row,
                # Those that another prompt wants are computed with this one too, not copied.
                wanted=prompt.needed_among(wanted),
                stored=prompt.needed_among(found),
            )
            for row, prompt in enumerate(prompts)
        ]
        return super()._batch(together, rows, capacity, upcoming)

    def _compute(
        self, runner: ModelRunner, prompts: Sequence[PromptSpans]
    ) -> tuple[PrefillPlan, list[None]]:
        plan = runner.plan_spans(prompts)
        runner.compute_spans(plan)
        return plan, [None] * len(prompts)


class PrecomputingRun(OrderedRun[Request]):
    """The requests of one `Engine.precompute` call, in their order, once their spans are computed.

    Which spans are computed together follows from the requests alone: each belongs to the first
    prompt that has it, and batches are made of these prompts. The store's folder has everything
    once the run has ended.
    """

    def __init__(
        self,
        executor: Executor,
        strategy: Strategy,
        lookaheads: Iterator[Sequence[PlannedRequest]],
        batch_size: int | None,
        store: KVStore,
    ) -> None:
        """Store what the run needs; iterating starts it.

        Args:
            executor: Executes the batches.
            strategy: The mask strategy.
            lookaheads: The planned requests, as many at a time as are sorted by length.
            batch_size: Prompts that run together; None to choose.
            store: The executor's store.
        """
        self._computer = SpanComputer(executor, strategy, batch_size, store)
        self._finder = SpanFinder(strategy)
        self._is_at_own_position = not executor.runner.turns_keys
        self._lookaheads = lookaheads
        self._store = store
        self._claimed: set[bytes] = set()
        self._num_requests = 0
        self._is_stopped = False
        super().__init__(self._run())

    @property
    def stats(self) -> RunStats:
        """Counts and times of the run so far.

        Nothing is generated; ``generations`` counts requests. A span that several have counts
        once.
        """
        return replace(
            self._computer.stats,
            generations=self._num_requests,
            cached_spans=len(self._computer.found),
        )

    @property
    def written(self) -> FolderCounters:
        """Counts of the store's folder, which are final once the run has ended."""
        return self._store.counters.folder

    def stop(self) -> None:
        """Start no more batches."""
        self._is_stopped = True

    def _run(self) -> Iterator[dict[int, Request]]:
        """Yield requests by number as they finish.

        Raises:
            KVStoreError: At the end, if the folder could not be written.
        """
        lost = self._store.counters.folder.not_written
        for lookahead in self._lookaheads:
            for finished in self._outcomes(lookahead):
                self._num_requests += len(finished)
                yield {planned.prompts.number: planned.request for planned in finished}
            if self._is_stopped or self._store.counters.folder.not_written > lost:
                break
        self._store.flush()
        if lost := self._store.counters.folder.not_written - lost:
            raise KVStoreError(
                f"{lost} spans were computed and could not be written; make room, and run this "
                "again for the rest"
            )

    def _outcomes(self, lookahead: Sequence[PlannedRequest]) -> Iterator[list[PlannedRequest]]:
        """Yield the requests of a lookahead, those last whose spans belong to others."""
        layouts = {number: one.prompts.layouts[0] for number, one in enumerate(lookahead)}
        known = known_spans(self._finder, layouts, at_own_position=self._is_at_own_position)
        owners, others = list[tuple[PlannedRequest, PromptSpans]](), list[PlannedRequest]()
        # As batches run: who claims a span computes it before others see it.
        by_length = sorted(
            zip(lookahead, known, strict=True), key=lambda pair: -len(pair[1].layout)
        )
        for planned, spans in by_length:
            if wanted := self._claim(spans):
                owners.append((planned, replace(spans, wanted=wanted)))
            else:
                others.append(planned)
        for batch in self._computer.results([prompt for _, prompt in owners]):
            yield [owners[index][0] for index, _ in batch]
            if self._is_stopped:
                return
        if others:
            yield others

    def _claim(self, prompt: PromptSpans) -> frozenset[int]:
        """Return the indices of the spans that no earlier prompt has, which are now this one's."""
        wanted = set()
        for index, identity in enumerate(prompt.identities):
            if prompt.is_storable(index) and identity not in self._claimed:
                self._claimed.add(identity)
                wanted.add(index)
        return frozenset(wanted)
