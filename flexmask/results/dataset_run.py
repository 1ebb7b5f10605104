"""Runs a data set through an engine into a result file or a stream, some rows at a time.

A `DatasetJob` says all about a run, so that this process or others can carry it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexmask.errors import RequestError
from flexmask.fusion import Fusion
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.results.result_writer import ResultWriter
from flexmask.results.resume import OutputMode
from flexmask.results.run_config import RunConfig
from flexmask.strategy import Strategy
from flexmask.tasks.judge import Judge
from flexmask.tasks.request_source import BadRow, OnError, RequestSource
from flexmask.tasks.shards import ShardRecord

if TYPE_CHECKING:
    from flexmask.engine import Engine, GenerationRun


class RowWriter(Protocol):
    """Receives the rows of a run: a `ResultWriter` or a `RowStream`."""

    @property
    def remaining(self) -> Iterable[Request]:
        """The requests to generate for."""

    @property
    def fusion(self) -> Fusion:
        """The fusion to generate for them under."""

    @property
    def judge(self) -> Judge:
        """Extracts answers from generations."""

    def write(self, results: Iterable[Generation | BadRow]) -> None:
        """Take rows, in any order."""


@dataclass(frozen=True)
class DatasetJob:
    """A run over a data set, as any process can carry it out.

    Its functions are called where the run is; they can be pickled if others are to run it.

    Attributes:
        open_requests: Opens the input.
        make_strategy: Makes the mask strategy.
        load_engine: Loads the model.
        record: Returns the configuration of the run, with the environment of the calling process.
        fusion: The fusion.
        judge: Extracts answers from generations and scores them.
        on_error: Effect of a row that cannot be used.
        options: Other options of `flexmask.Engine.generate`.
    """

    open_requests: Callable[[], RequestSource]
    make_strategy: Callable[[], Strategy]
    load_engine: Callable[[], Engine]
    record: Callable[[], RunConfig]
    fusion: Fusion
    judge: Judge
    on_error: OnError
    options: Mapping[str, Any]

    def open_writer(
        self,
        path: Path,
        requests: Iterable[Request | BadRow],
        mode: OutputMode,
        shard: ShardRecord | None = None,
    ) -> ResultWriter:
        """Open a result file for requests of the run (`ResultWriter.open`).

        Args:
            path: The result file.
            requests: All requests of the file.
            mode: What to do if there is a result or a journal already.
            shard: The shard that the requests are; None if they are all.
        """
        return ResultWriter.open(
            path,
            config=replace(self.record(), shard=shard),
            requests=requests,
            fusion=self.fusion,
            mode=mode,
            judge=self.judge,
        )

    def run(self, engine: Engine, strategy: Strategy, writer: RowWriter) -> DatasetRun:
        """Plan a run over the remaining requests of a writer.

        Raises:
            RequestError: If the model cannot take a request and bad rows stop the run.
        """
        return DatasetRun(engine, strategy, writer, on_error=self.on_error, **self.options)


class DatasetRun:
    """Generates for the remaining requests of a row writer, and writes the generations.

    Attributes:
        generations: The engine's run over these requests, with its counts.
    """

    def __init__(
        self,
        engine: Engine,
        strategy: Strategy,
        writer: RowWriter,
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
        """Write generations as they finish, some at a time, and yield them.

        Args:
            should_stop: Called after each write; True ends the run once the prompts in flight
                have finished.
        """
        for generations in self.generations.batches():
            self._write(generations)
            yield generations
            if should_stop():
                self.generations.stop()
        self._write([])

    def _write(self, generations: Sequence[Generation]) -> None:
        self._writer.write([*self._refused, *generations])
        self._refused.clear()

    def _refuse(self, request: Request, error: RequestError) -> None:
        self._refused.append(BadRow(request.uuid, str(error), request))
