"""The queue of the shards of a run: which worker has which, and what is done after a death."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from flexmask.request import RequestKey

MOST_DEATHS = 3
"""Deaths of workers with the same row in flight, after which that row is given up."""


@dataclass(frozen=True)
class Assignment:
    """A shard that a worker has to run.

    Attributes:
        number: Number of the shard.
        alone: Rows to run first, one at a time, since workers died with them in flight; the rest
            of the shard is assigned again afterwards.
        given_up: Rows not to run, each with the reason.
    """

    number: int
    alone: frozenset[RequestKey] = frozenset()
    given_up: Mapping[RequestKey, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """The progress of a run by several workers.

    Attributes:
        shards: Number of shards.
        finished: Shards that have a result file.
        rows: Rows written by the workers.
        tokens: Tokens that they generated, or scored.
        workers_with_rows: Workers that have written rows.
        warnings: Warnings of the workers so far, each once.
    """

    shards: int
    finished: int
    rows: int
    tokens: int
    workers_with_rows: int
    warnings: Sequence[str]


class ShardQueue:
    """Hands out shards and counts deaths; it knows nothing about Ray and holds no rows.

    A row is *in flight* if a worker has started it and not finished it. Each death of a worker
    counts for every row in flight. A row with two deaths is run alone, so that a third shows
    whether it was to blame; then it is given up.
    """

    def __init__(self, count: int) -> None:
        """Put the shards from 1 to ``count`` into the queue."""
        self._count = count
        self._waiting = deque(range(1, count + 1))
        self._held: dict[str, set[int]] = defaultdict(set)
        self._finished: set[int] = set()
        self._deaths: dict[int, Counter[RequestKey]] = defaultdict(Counter)
        self._given_up: dict[int, dict[RequestKey, str]] = defaultdict(dict)
        self._resumed: dict[int, int] = {}
        self._warnings: dict[str, None] = {}
        self._with_rows: set[str] = set()
        self._rows = self._tokens = 0
        self._deaths_without_row = 0
        self._is_stopped = False

    def take(self, worker: str, *, may_be_alone: bool) -> Assignment | None:
        """Assign a shard to a worker; None if there is none for it.

        Args:
            worker: Name of the worker.
            may_be_alone: Whether the worker is free to run rows one at a time.
        """
        if self._is_stopped:
            return None
        for number in self._waiting:
            alone = self._to_run_alone(number)
            if may_be_alone or not alone:
                self._waiting.remove(number)
                self._held[worker].add(number)
                return Assignment(number, alone, dict(self._given_up.get(number, {})))
        return None

    def opened(self, number: int, resumed: int) -> None:
        """Record the rows that a shard had when it was opened for the first time."""
        self._resumed.setdefault(number, resumed)

    def report(self, worker: str, rows: int, tokens: int) -> bool:
        """Count rows that a worker has written; return True if it shall stop."""
        self._rows += rows
        self._tokens += tokens
        self._with_rows.add(worker)
        self._deaths_without_row = 0
        return self._is_stopped

    def finish(self, worker: str, number: int) -> None:
        """Record that a shard has its result file."""
        self._held[worker].discard(number)
        self._finished.add(number)
        self._deaths.pop(number, None)

    def give_back(self, worker: str, number: int) -> None:
        """Put a shard whose rows that had to run alone are finished back into the queue."""
        self._held[worker].discard(number)
        self._deaths.pop(number, None)
        self._waiting.appendleft(number)

    def warn(self, message: str) -> None:
        """Keep a warning of a worker, once."""
        self._warnings.setdefault(message)

    def held_by(self, worker: str) -> list[int]:
        """Return the shards that a worker has."""
        return sorted(self._held.get(worker, ()))

    def lose(
        self, worker: str, in_flight: Mapping[int, Sequence[RequestKey]], reason: str
    ) -> tuple[RequestKey | None, bool]:
        """Put the shards of a dead worker back into the queue, and count the death.

        Args:
            worker: Name of the worker.
            in_flight: By number of a shard that it had, the rows that were in flight.
            reason: What is known about its death.

        Returns:
            The row that is given up now, or None; and whether so many workers died without a row
            in flight that no other shall be started.
        """
        rows = [*chain.from_iterable(in_flight.values())]
        given_up = None
        for number, keys in in_flight.items():
            self._deaths[number].update(keys)
            for key in keys:
                if len(rows) == 1 and self._deaths[number][key] >= MOST_DEATHS:
                    self._given_up[number][key] = (
                        f"{MOST_DEATHS} workers died while they computed it; the last: {reason}"
                    )
                    del self._deaths[number][key]
                    given_up = key
        if not rows:
            self._deaths_without_row += 1
        self._waiting.extendleft(sorted(self._held.pop(worker, ()), reverse=True))
        return given_up, self._deaths_without_row >= MOST_DEATHS

    def has_more(self) -> bool:
        """Return True if a shard waits for a worker."""
        return bool(self._waiting) and not self._is_stopped

    def resumed_rows(self) -> int:
        """Return the number of rows that the shards had when they were opened."""
        return sum(self._resumed.values())

    def stop(self) -> None:
        """Assign nothing from now on, and let the workers stop."""
        self._is_stopped = True

    def progress(self) -> Progress:
        """Return the progress so far."""
        return Progress(
            shards=self._count,
            finished=len(self._finished),
            rows=self._rows,
            tokens=self._tokens,
            workers_with_rows=len(self._with_rows),
            warnings=[*self._warnings],
        )

    def _to_run_alone(self, number: int) -> frozenset[RequestKey]:
        deaths: Mapping[RequestKey, int] = self._deaths.get(number, {})
        return frozenset(key for key, count in deaths.items() if count >= MOST_DEATHS - 1)
