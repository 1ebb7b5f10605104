"""A precomputing run: the spans of requests, of one `Engine.precompute` call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from threading import RLock

from flexmask.engine.executor import Executor
from flexmask.engine.model_runner import ModelRunner
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
    """Computes the spans that prompts want, and gives them to the executor's store."""

    def _layout_of(self, prompt: PromptSpans) -> Layout:
        return prompt.layout

    def _compute(
        self, runner: ModelRunner, prompts: Sequence[PromptSpans]
    ) -> tuple[PrefillPlan, list[None]]:
        plan = runner.plan_spans([replace(each, row=row) for row, each in enumerate(prompts)])
        runner.compute_spans(plan)
        return plan, [None] * len(prompts)


@dataclass(frozen=True)
class _Claims:
    """The spans of a run, each of which is looked up in the store once.

    Attributes:
        store: The store.
        found: Identities of those that it had.
        missing: Identities of the others, each of which is computed for one prompt.
    """

    store: KVStore
    found: set[bytes]
    missing: set[bytes]

    def of(self, prompt: PromptSpans) -> PromptSpans:
        """Return a prompt that wants the spans which neither the store nor an earlier one has."""
        wanted = set()
        for index, identity in enumerate(prompt.identities):
            if identity in self.found or identity in self.missing:
                continue
            if not prompt.is_storable(index):
                continue
            if self.store.use(identity):
                self.found.add(identity)
            else:
                self.missing.add(identity)
                wanted.add(index)
        return replace(prompt, wanted=frozenset(wanted))


class PrecomputingRun(Iterator[Request]):
    """The requests of one `Engine.precompute` call, as their spans are computed.

    Requests whose spans are all found come first among those that are looked at together. The
    store's folder has everything once the run has ended.
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
        self._computer = SpanComputer(executor, strategy, batch_size)
        self._finder = SpanFinder(strategy)
        self._is_at_own_position = not executor.runner.turns_keys
        self._lookaheads = lookaheads
        self._store = store
        self._claims = _Claims(store, set(), set())
        self._num_requests = 0
        self._is_stopped = False
        self._finished = self._run()
        self._waiting: list[Request] = []
        self._lock = RLock()

    @property
    def stats(self) -> RunStats:
        """Counts and times of the run so far.

        Nothing is generated; ``generations`` counts requests. A span that several have counts
        once.
        """
        return replace(
            self._computer.stats,
            generations=self._num_requests,
            cached_spans=len(self._claims.found),
        )

    @property
    def written(self) -> FolderCounters:
        """Counts of the store's folder, which are final once the run has ended."""
        return self._store.counters.folder

    def __next__(self) -> Request:
        """Return the next request that has no span left to compute.

        Raises:
            KVStoreError: At the end, if the folder could not be written.
        """
        with self._lock:
            while not self._waiting:
                self._waiting = next(self._finished)[::-1]
            return self._waiting.pop()

    def batches(self) -> Iterator[list[Request]]:
        """Yield requests as they finish, some at a time.

        Raises:
            KVStoreError: As iterating does.
        """
        while True:
            with self._lock:
                finished = next(self._finished, None)
            if finished is None:
                return
            yield finished

    def stop(self) -> None:
        """Start no more batches."""
        self._is_stopped = True

    def _run(self) -> Iterator[list[Request]]:
        lost = self._store.counters.folder.not_written
        for lookahead in self._lookaheads:
            for finished in self._outcomes(lookahead):
                self._num_requests += len(finished)
                yield finished
            if self._is_stopped or self._store.counters.folder.not_written > lost:
                break
        self._store.flush()
        if lost := self._store.counters.folder.not_written - lost:
            raise KVStoreError(
                f"{lost} spans were computed and could not be written; make room, and run this "
                "again for the rest"
            )

    def _outcomes(self, lookahead: Sequence[PlannedRequest]) -> Iterator[list[Request]]:
        """Yield the requests of a lookahead, those first of which nothing is missing."""
        layouts = {number: one.prompts.layouts[0] for number, one in enumerate(lookahead)}
        known = known_spans(self._finder, layouts, at_own_position=self._is_at_own_position)
        complete, incomplete = list[Request](), list[tuple[Request, PromptSpans]]()
        # As batches run: who claims a span computes it before others see it.
        by_length = sorted(
            zip(lookahead, known, strict=True), key=lambda pair: -len(pair[1].layout)
        )
        for (request, _), spans in by_length:
            prompt = self._claims.of(spans)
            if prompt.wanted:
                incomplete.append((request, prompt))
            else:
                complete.append(request)
        if complete:
            yield complete
        for batch in self._computer.results([prompt for _, prompt in incomplete]):
            yield [incomplete[index][0] for index, _ in batch]
            if self._is_stopped:
                return
