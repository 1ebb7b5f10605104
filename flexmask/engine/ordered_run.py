"""Results that finish in any order, handed out in the order of their requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from threading import RLock
from typing import Generic, TypeVar

Result = TypeVar("Result")


class OrderedRun(Iterator[Result], Generic[Result]):
    """The results of one call of the engine, in the order of the requests.

    They finish in another order, in which `batches` yields them. Several threads may share a run.
    """

    def __init__(self, finished: Iterator[Mapping[int, Result | None]]) -> None:
        """Store where results come from; iterating starts the run.

        Args:
            finished: Yields results by their number, from 0 on, as they finish; None for a
                request that is refused.
        """
        self._finished = finished
        self._waiting: dict[int, Result | None] = {}
        self._next_number = 0
        self._lock = RLock()

    def __next__(self) -> Result:
        """Return the next result in the order of the requests.

        Raises:
            RequestError: If there is none for a request, because logits are NaN or infinite, and
                the run has no ``on_refused``.
        """
        with self._lock:
            while True:
                while self._next_number not in self._waiting:
                    self._waiting.update(next(self._finished))
                self._next_number += 1
                result = self._waiting.pop(self._next_number - 1)
                if result is not None:
                    return result

    def batches(self) -> Iterator[list[Result]]:
        """Yield results as they finish, some at a time.

        Raises:
            RequestError: As iterating does.
        """
        while True:
            with self._lock:
                finished = next(self._finished, None)
            if finished is None:
                return
            yield [result for result in finished.values() if result is not None]
