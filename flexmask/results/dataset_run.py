"""Runs a data set through an engine into a result file, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flexmask.errors import RequestError
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.results.result_writer import ResultWriter
from flexmask.strategy import Strategy
from flexmask.tasks.request_source import BadRow, OnError

if TYPE_CHECKING:
    from flexmask.engine import Engine, GenerationRun


class DatasetRun:
    """Generates for the remaining requests of a result writer, and writes the generations.

    Attributes:
        generations: The engine's run over these requests, with its counts.
    """

    def __init__(
        self,
        engine: Engine,
        strategy: Strategy,
        writer: ResultWriter,
        *,
        on_error: OnError = "stop",
        **options: Any,
    ) -> None:
        """Plan the run; iterating over `batches` starts it.

        Args:
            engine: Holds the model.
            strategy: The mask strategy.
            writer: Receives the rows.
            on_error: ``stop`` raises at a request that the model cannot take; ``skip`` writes a
                row with the reason.
            **options: Options of `flexmask.Engine.generate`, except for the fusion, which is that
                of ``writer``.

        Raises:
            RequestError: If the model cannot take a request and ``on_error`` is ``stop``.
        """
        self._writer = writer
        self._refused: list[BadRow] = []
        on_refused = self._refuse if on_error == "skip" else None
        self.generations: GenerationRun = engine.generate(
            writer.remaining,
            strategy,
            fusion=writer.fusion,
            answer_of=writer.judge.prediction,
            on_refused=on_refused,
            **options,
        )

    def batches(self, should_stop: Callable[[], bool]) -> Iterator[Sequence[Generation]]:
        """Write generations as batches finish, and yield them.

        Args:
            should_stop: Called after each write; True ends the run early.
        """
        for generations in self.generations.batches():
            self._write(generations)
            yield generations
            if should_stop():
                return
        self._write([])

    def _write(self, generations: Sequence[Generation]) -> None:
        self._writer.write([*self._refused, *generations])
        self._refused.clear()

    def _refuse(self, request: Request, error: RequestError) -> None:
        self._refused.append(BadRow(request.uuid, str(error), request))
