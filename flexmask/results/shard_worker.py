"""A worker of a run: takes shards from a queue and runs them with one engine."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from flexmask.choice_scores import Score
from flexmask.errors import FlexMaskError, FlexMaskWarning
from flexmask.fusion import Fusion
from flexmask.generation import Generation
from flexmask.inputs.rows import Input, Row
from flexmask.request import Request, RequestKey
from flexmask.results.dataset_run import DatasetJob, DatasetRun
from flexmask.results.journal import OutputInUseError
from flexmask.results.result_writer import ResultWriter
from flexmask.results.schema import Result
from flexmask.results.shard_files import ShardFolder, StartedRows
from flexmask.results.shard_queue import Assignment
from flexmask.tasks.judge import ChoiceJudge, Judge
from flexmask.tasks.request_source import BadRow, RequestSource

if TYPE_CHECKING:
    from flexmask.engine import Engine, RunStats
    from flexmask.strategy import Strategy

LOCK_WAIT_S = 150.0
"""Seconds to wait for the lock of a journal: network file systems keep that of a machine that
crashed until its lease ends."""


class Assignments(Protocol):
    """The queue of shards, as one worker sees it (`flexmask.results.shard_queue.ShardQueue`)."""

    def take(self, *, may_be_alone: bool) -> Assignment | None:
        """Return the next shard to run; None if there is none."""

    def opened(self, number: int, resumed: int) -> None:
        """Record the rows that a shard has already."""

    def report(self, rows: int, tokens: int) -> bool:
        """Count rows; return True if the worker shall stop."""

    def finish(self, number: int) -> None:
        """Record that a shard has its result file."""

    def give_back(self, number: int) -> None:
        """Return a shard whose rows to run alone are finished."""

    def warn(self, message: str) -> None:
        """Pass on a warning."""


@dataclass(frozen=True)
class OpenShard:
    """A shard that is being written.

    Attributes:
        number: Its number.
        writer: Writes its result file.
        requests: The requests to run.
        started: The rows that were started.
    """

    number: int
    writer: ResultWriter
    requests: Sequence[Request]
    started: StartedRows

    def finish(self) -> None:
        """Write the result file."""
        self.writer.__exit__(None, None, None)
        self.started.close()

    def suspend(self, *, is_orderly: bool) -> None:
        """Close with the finished rows in the journal.

        Args:
            is_orderly: Whether nothing failed, so that no row is to blame.
        """
        self.writer.suspend()
        self.started.close(is_orderly=is_orderly)


class ShardsWriter:
    """Writes the rows of shards that are opened one after another, into a file each.

    The engine gets the requests of all of them as one run, so that its batches stay full where
    one shard ends and the next begins. A shard is finished with its last row. As a context
    manager it closes those that are not.

    Attributes:
        fusion: The fusion under which they run.
        judge: Extracts answers from results and judges them.
    """

    def __init__(
        self,
        open_next: Callable[[], OpenShard | None],
        finished: Callable[[OpenShard], None],
        job: DatasetJob[Any],
    ) -> None:
        """Open no shard yet.

        Args:
            open_next: Opens the next shard; None if there is none.
            finished: Called with each shard whose rows are all written.
            job: The run.
        """
        self.fusion: Fusion = job.fusion.after_expansion
        self.judge: Judge | ChoiceJudge = job.judge
        self._open_next = open_next
        self._finished = finished
        self._upcoming: OpenShard | None = None
        self._open: dict[int, OpenShard] = {}
        self._shard_of: dict[RequestKey, OpenShard] = {}

    @property
    def has_requests(self) -> bool:
        """True if there is a shard with requests left; it is opened, those before it finished."""
        if self._upcoming is None:
            self._upcoming = self._next()
        return self._upcoming is not None

    @property
    def remaining(self) -> Iterator[Request]:
        """The requests of one shard after another; each is noted as started."""
        while self.has_requests:
            shard, self._upcoming = self._upcoming, None
            assert shard is not None
            for request in shard.requests:
                shard.started.add(request.key)
                yield request

    def write(self, results: Iterable[Result]) -> None:
        """Write rows to the files of their shards; finish those that are complete."""
        of_shard: dict[int, list[Result]] = {}
        for result in results:
            key = result.key if isinstance(result, BadRow) else result.request.key
            of_shard.setdefault(self._shard_of.pop(key).number, []).append(result)
        for number, rows in of_shard.items():
            shard = self._open[number]
            shard.writer.write(rows)
            if shard.writer.is_complete:
                del self._open[number]
                self._finished(shard)

    def _next(self) -> OpenShard | None:
        while (shard := self._open_next()) is not None:
            if not shard.writer.is_complete:
                self._open[shard.number] = shard
                self._shard_of.update((each.key, shard) for each in shard.requests)
                return shard
            self._finished(shard)
        return None

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the shards that are not complete; after a failure, started rows stay noted."""
        is_orderly = exception is None or isinstance(exception, FlexMaskError)
        for shard in self._open.values():
            shard.suspend(is_orderly=is_orderly)


class _OneRow:
    """Takes the row of one request for the writer of its shard."""

    def __init__(self, writer: ResultWriter, request: Request) -> None:
        self.remaining = [request]
        self.fusion = writer.fusion
        self.judge = writer.judge
        self.write = writer.write


class ShardWorker:
    """Runs shards with one engine, which is loaded when the first request needs it."""

    def __init__(
        self, job: DatasetJob[Any], folder: ShardFolder, assignments: Assignments
    ) -> None:
        """Prepare; nothing is opened or loaded yet."""
        self._job = job
        self._folder = folder
        self._assignments = assignments
        self._stats: RunStats | None = None
        self._is_stopped = False

    def run(self) -> RunStats | None:
        """Run shards until none is left; return counts and times of this call.

        Raises:
            FlexMaskError: If a shard cannot be run, with any engine.
        """
        self._stats = None
        with warnings.catch_warnings():
            warnings.simplefilter("once", FlexMaskWarning)
            show = warnings.showwarning

            def pass_on(message: Warning | str, category: Any, *where: Any, **more: Any) -> None:
                if issubclass(category, FlexMaskWarning):
                    self._assignments.warn(str(message))
                else:
                    show(message, category, *where, **more)

            warnings.showwarning = pass_on
            while (assignment := self._assignments.take(may_be_alone=True)) is not None:
                if assignment.alone:
                    self._run_alone(assignment)
                else:
                    self._run_from(assignment)
        return self._stats

    def _run_from(self, first: Assignment) -> None:
        """Run a shard, and all that follow it as long as none has to run alone."""
        assignments = self._and_following(first)

        def open_next() -> OpenShard | None:
            assignment = next(assignments, None)
            return None if assignment is None else self._open(assignment)

        def finished(shard: OpenShard) -> None:
            shard.finish()
            self._assignments.finish(shard.number)

        with ShardsWriter(open_next, finished, self._job) as writer:
            if writer.has_requests:
                self._carry_out(self._job.run(self._engine, self._strategy, writer))

    def _and_following(self, first: Assignment) -> Iterator[Assignment]:
        following: Assignment | None = first
        while following is not None:
            yield following
            following = self._assignments.take(may_be_alone=False)

    def _run_alone(self, assignment: Assignment) -> None:
        """Run the rows that have to run alone, one after another."""
        shard = self._open(assignment)
        is_orderly = False
        try:
            for request in shard.requests:
                if request.key not in assignment.alone or self._is_stopped:
                    continue
                engine, strategy = self._engine, self._strategy
                shard.started.clear()
                shard.started.add(request.key)
                self._carry_out(self._job.run(engine, strategy, _OneRow(shard.writer, request)))
            is_orderly = True
        except FlexMaskError:
            is_orderly = True
            raise
        finally:
            shard.suspend(is_orderly=is_orderly)
        self._assignments.give_back(assignment.number)

    def _carry_out(self, run: DatasetRun[Any]) -> None:
        for batch in run.batches(lambda: self._is_stopped):
            self._report(batch)
        stats = run.engine_run.stats
        self._stats = stats if self._stats is None else self._stats.plus(stats)

    def _report(self, batch: Sequence[Generation | Score]) -> None:
        tokens = sum(map(_num_tokens, batch))
        if self._assignments.report(len(batch), tokens):
            self._is_stopped = True

    def _open(self, assignment: Assignment) -> OpenShard:
        part = self._folder.part(assignment.number)
        path = self._folder.file(assignment.number)
        # Kept in memory, so that the input is read once however often they are iterated over.
        requests = list(replace(self._requests, part=part))
        until = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                writer = self._job.open_writer(path, requests, "resume", part.record)
                break
            except OutputInUseError:  # by a worker that is dying
                if time.monotonic() > until:
                    raise
                time.sleep(1.0)
        self._assignments.opened(assignment.number, writer.summary.resumed)
        given_up = assignment.given_up
        left = [each for each in writer.remaining if each.key not in given_up]
        writer.write(
            BadRow(each.uuid, f"{each.label}: {given_up[each.key]}", each)
            for each in writer.remaining
            if each.key in given_up
        )
        return OpenShard(assignment.number, writer, left, StartedRows(path))

    @cached_property
    def _requests(self) -> RequestSource:
        requests = self._job.open_requests()
        return replace(requests, rows=replace(requests.rows, read=ForwardRows(requests.rows)))

    @cached_property
    def _engine(self) -> Engine:
        return self._job.load_engine()

    @cached_property
    def _strategy(self) -> Strategy:
        return self._job.make_strategy()


def _num_tokens(made: Generation | Score) -> int:
    """Return the number of tokens generated, or scored."""
    if isinstance(made, Generation):
        return len(made.token_ids)
    return sum(choice.num_tokens for choice in made.choices)


class ForwardRows:
    """Reads parts of an input one after another in one pass, as long as they ascend."""

    def __init__(self, rows: Input) -> None:
        """Start nowhere."""
        self._input = rows
        self._rows: Iterator[Row] = iter(())
        self._next = -1

    def __call__(self, first: int) -> Iterator[Row]:
        """Yield the rows from ``first`` on; go back only if it was passed already."""
        if not 0 <= self._next <= first:
            self._rows, self._next = self._input.rows_from(first), first
        for row in self._rows:
            self._next += 1
            if self._next > first:
                yield row
