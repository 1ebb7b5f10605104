"""Runs a data set through an engine into a result file or a stream, some rows at a time.

A `DatasetJob` says all about a run, so that this process or others can carry it out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from flexmask.choice_scores import Score
from flexmask.errors import RequestError
from flexmask.fusion import Fusion
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.results.result_writer import ResultWriter
from flexmask.results.resume import OutputMode
from flexmask.results.run_config import RunConfig
from flexmask.results.schema import ASKED_FOR, Result
from flexmask.strategy import Strategy
from flexmask.tasks.judge import ChoiceJudge, Judge
from flexmask.tasks.request_source import BadRow, OnError, RequestSource
from flexmask.tasks.shards import ShardRecord

OnRefused = Callable[[Request, RequestError], None]

if TYPE_CHECKING:
    from flexmask.engine import Engine, GenerationRun, RunStats
    from flexmask.engine.scoring import ScoringRun


Made = TypeVar("Made", Generation, Score)
"""The result of a request in a run."""


class EngineRun(Protocol[Made]):
    """A run of the engine: a `GenerationRun` or a `ScoringRun`."""

    @property
    def stats(self) -> RunStats:
        """Counts and times so far."""

    def batches(self) -> Iterator[list[Made]]:
        """Yield results as they finish, some at a time."""

    def stop(self) -> None:
        """Start no more prompts."""


class RowWriter(Protocol):
    """Receives the rows of a run: a `ResultWriter` or a `RowStream`."""

    @property
    def remaining(self) -> Iterable[Request]:
        """The requests to run."""

    @property
    def fusion(self) -> Fusion:
        """The fusion to run them under."""

    @property
    def judge(self) -> Judge | ChoiceJudge:
        """Extracts answers from results."""

    def write(self, results: Iterable[Result]) -> None:
        """Take rows, in any order."""


@dataclass(frozen=True)
class DatasetJob(ABC, Generic[Made]):
    """A run over a data set, as any process can carry it out.

    Its functions are called where the run is; they can be pickled if others are to run it.

    Attributes:
        open_requests: Opens the input.
        make_strategy: Makes the mask strategy.
        load_engine: Loads the model.
        record: Returns the configuration of the run, with the environment of the calling process.
        fusion: The fusion.
        judge: Extracts answers from results and judges them.
        on_error: Effect of a row that cannot be used.
        options: Other options of `flexmask.Engine.generate` or `flexmask.Engine.score`.
    """

    open_requests: Callable[[], RequestSource]
    make_strategy: Callable[[], Strategy]
    load_engine: Callable[[], Engine]
    record: Callable[[], RunConfig]
    fusion: Fusion
    judge: Judge | ChoiceJudge
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
            asked_for=self.asked_for,
        )

    @property
    def asked_for(self) -> list[str]:
        """The options that ask for more columns."""
        return [name for name in ASKED_FOR if self.options.get(name)]

    @abstractmethod
    def run(self, engine: Engine, strategy: Strategy, writer: RowWriter) -> DatasetRun[Made]:
        """Plan a run over the remaining requests of a writer.

        Raises:
            RequestError: If the model cannot take a request and bad rows stop the run.
        """


@dataclass(frozen=True)
class GenerationJob(DatasetJob[Generation]):
    """A run that generates."""

    def run(self, engine: Engine, strategy: Strategy, writer: RowWriter) -> DatasetRun[Generation]:
        """Plan to generate for the remaining requests."""
        return DatasetRun.generating(
            engine, strategy, writer, on_error=self.on_error, **self.options
        )


@dataclass(frozen=True)
class ScoringJob(DatasetJob[Score]):
    """A run that scores choices."""

    def run(self, engine: Engine, strategy: Strategy, writer: RowWriter) -> DatasetRun[Score]:
        """Plan to score the choices of the remaining requests."""
        return DatasetRun.scoring(engine, strategy, writer, on_error=self.on_error, **self.options)


class DatasetRun(Generic[Made]):
    """Runs the remaining requests of a row writer, and writes what comes of them.

    Attributes:
        engine_run: The engine's run over these requests, with its counts.
    """

    def __init__(
        self,
        start: Callable[[OnRefused | None], EngineRun[Made]],
        writer: RowWriter,
        on_error: OnError,
    ) -> None:
        """Plan the run; iterating over `batches` starts it.

        Args:
            start: Plans the engine's run, given what to do with refused requests.
            writer: Receives the rows.
            on_error: ``stop`` raises at a request that the model cannot take; ``skip`` writes a
                row with the reason.
        """
        self._writer = writer
        self._refused: list[BadRow] = []
        self.engine_run: EngineRun[Made] = start(self._refuse if on_error == "skip" else None)

    @staticmethod
    def generating(
        engine: Engine,
        strategy: Strategy,
        writer: RowWriter,
        *,
        on_error: OnError = "stop",
        **options: Any,
    ) -> DatasetRun[Generation]:
        """Plan to generate for the requests.

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
        judge = writer.judge
        assert isinstance(judge, Judge)

        def start(on_refused: OnRefused | None) -> GenerationRun:
            return engine.generate(
                writer.remaining,
                strategy,
                fusion=writer.fusion,
                answer_of=judge.prediction,
                on_refused=on_refused,
                **options,
            )

        return DatasetRun(start, writer, on_error)

    @staticmethod
    def scoring(
        engine: Engine,
        strategy: Strategy,
        writer: RowWriter,
        *,
        on_error: OnError = "stop",
        **options: Any,
    ) -> DatasetRun[Score]:
        """Plan to score the choices of the requests.

        Args:
            engine: Holds the model.
            strategy: The mask strategy.
            writer: Receives the rows.
            on_error: As in `generating`.
            **options: Options of `flexmask.Engine.score`, except for the fusion.

        Raises:
            RequestError: As in `generating`.
        """

        def start(on_refused: OnRefused | None) -> ScoringRun:
            return engine.score(
                writer.remaining,
                strategy,
                fusion=writer.fusion,
                on_refused=on_refused,
                **options,
            )

        return DatasetRun(start, writer, on_error)

    def batches(self, should_stop: Callable[[], bool]) -> Iterator[Sequence[Made]]:
        """Write results as they finish, some at a time, and yield them.

        Args:
            should_stop: Called after each write; True ends the run once the prompts in flight
                have finished.
        """
        for made in self.engine_run.batches():
            self._write(made)
            yield made
            if should_stop():
                self.engine_run.stop()
        self._write([])

    def _write(self, made: Sequence[Made]) -> None:
        self._writer.write([*self._refused, *made])
        self._refused.clear()

    def _refuse(self, request: Request, error: RequestError) -> None:
        self._refused.append(BadRow(request.uuid, str(error), request))
