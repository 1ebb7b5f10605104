"""Writes result files through a crash-safe journal, from which a run resumes row by row.

During a run its finished rows are in ``<output>.partial``, the journal: an Arrow IPC stream with
checksums, appended to and synced at each write, and locked by the writing process. When the run
completes, the rows are sorted in input order, the file is moved in place and the journal removed::

    write ─► out.feather.partial ─► out.feather.tmp ─► out.feather
             append, sync           sync               atomic rename

So ``out.feather`` is always a complete file, and the journal holds every finished row of an
interrupted run. A resumed run copies the rows that it keeps into a new journal, which replaces the
old one atomically.

The requests are iterated twice and never kept in memory: once to find the remaining ones, and
again to run them. A resumed run tries failed rows again.

Example::

    config = RunConfig(run={"strategy": "causal", "seed": 0}, environment={"device": "cuda"})
    with ResultWriter.open("out.feather", config=config, requests=requests) as writer:
        for generation in engine.generate(writer.remaining):
            writer.write([generation])
    print(writer.summary.accuracy)
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from flexmask.errors import FlexMaskWarning, OutputError, RequestError
from flexmask.fusion import Fusion
from flexmask.request import Request, RequestKey
from flexmask.results.formats import ROWS_PER_BATCH, read_rows, write_rows
from flexmask.results.journal import Journal
from flexmask.results.output_path import writable_path
from flexmask.results.resume import (
    EarlierRun,
    OutputMode,
    Plan,
    find_earlier,
    keys,
    make_plan,
    values,
)
from flexmask.results.run_config import RunConfig
from flexmask.results.schema import FAILED, RUN, Result, key_of, row_of, schema_of
from flexmask.tasks.judge import ChoiceJudge, Judge
from flexmask.tasks.request_source import BadRow


@dataclass(frozen=True)
class ResultSummary:
    """Counts over the rows of a result file.

    Attributes:
        rows: Finished rows, including those of earlier runs.
        resumed: Rows that existed when the writer was opened.
        judged: Rows whose request has accepted answers.
        correct: Rows whose prediction is an accepted answer.
        failed: Rows that could not be generated.
    """

    rows: int
    resumed: int
    judged: int
    correct: int
    failed: int = 0

    @property
    def accuracy(self) -> float | None:
        """Share of judged rows that are correct; None if no row is judged."""
        return self.correct / self.judged if self.judged else None

    def plus(
        self, verdicts: Collection[bool | None], finish_reasons: Iterable[str]
    ) -> ResultSummary:
        """Return the counts with more rows added, given their columns ``correct`` and finish."""
        return replace(
            self,
            rows=self.rows + len(verdicts),
            judged=self.judged + sum(verdict is not None for verdict in verdicts),
            correct=self.correct + sum(verdict is True for verdict in verdicts),
            failed=self.failed + sum(reason == FAILED for reason in finish_reasons),
        )


class ExpandedRequests(Iterable[Request | BadRow]):
    """The requests of a run, expanded by its fusion: one for each row of the result file."""

    def __init__(self, requests: Iterable[Request | BadRow], fusion: Fusion) -> None:
        """Expand nothing yet; every iteration reads ``requests`` again."""
        self._requests = requests
        self._fusion = fusion

    def __iter__(self) -> Iterator[Request | BadRow]:
        """Iterate from the beginning."""
        for request in self._requests:
            if isinstance(request, BadRow):
                yield request
            else:
                yield from self._fusion.expand(request)


class Remaining(Iterable[Request]):
    """The requests without a row when the writer was opened, in input order.

    Iterating reads the input; ``len`` does not.
    """

    def __init__(self, requests: Iterable[Request | BadRow], plan: Plan) -> None:
        """Filter ``requests`` by ``plan``."""
        self._requests = requests
        self._has_row = plan.has_row
        self._length = sum(not has_row for has_row in plan.has_row.values()) - len(plan.bad)

    def __len__(self) -> int:
        """Return the number of requests."""
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """Iterate from the beginning.

        Raises:
            RequestError: If the input has changed since the writer was opened.
        """
        for request in self._requests:
            if request.key not in self._has_row:
                raise RequestError(
                    f"the input changed while it was read: uuid {request.uuid!r} is new"
                )
            if isinstance(request, Request) and not self._has_row[request.key]:
                yield request


class ResultWriter:
    """Writes the rows of one run; a context manager.

    A clean exit writes the result file. An exception, Ctrl-C included, leaves the journal with the
    finished rows.

    Attributes:
        remaining: The requests to generate for; if there are none, the file is complete.
        fusion: The fusion under which to generate for ``remaining``.
        summary: Counts over the rows so far.
        judge: Extracts answers from generations and scores them.
    """

    def __init__(
        self,
        output: Path,
        journal: Journal,
        schema: pa.Schema,
        requests: Iterable[Request | BadRow],
        fusion: Fusion,
        plan: Plan,
        judge: Judge | ChoiceJudge,
    ) -> None:
        """Wrap an output that `open` has locked and checked."""
        self.remaining = Remaining(requests, plan)
        self.fusion = fusion
        verdicts, reasons = values(plan.rows, "correct"), values(plan.rows, "finish_reason")
        self.summary = ResultSummary(0, plan.rows.num_rows, 0, 0).plus(verdicts, reasons)
        self._output = output
        self._journal = journal
        self._schema = schema
        self.judge = judge
        self._order: Collection[RequestKey] = plan.has_row.keys()
        self._pending = {key for key, has_row in plan.has_row.items() if not has_row}
        self._is_untouched = plan.is_complete

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        config: RunConfig,
        requests: Iterable[Request | BadRow],
        fusion: Fusion = Fusion(),
        mode: OutputMode = "new",
        judge: Judge | ChoiceJudge = Judge(),
        asked_for: Collection[str] = (),
    ) -> Self:
        """Lock the output, find the remaining requests, and write the bad rows.

        Args:
            path: The result file; its extension selects the format. Missing folders are created,
                and a symbolic link is followed.
            config: Recorded in the file; a resumed run must have the same ``run``.
            requests: All requests of the run, finished or not, in the order of the file. They
                are iterated more than once.
            fusion: The fusion of the run, which decides whether a request has one row, or one for
                each of several segments and samples (`Fusion.expand`).
            mode: What to do if there is a result or a journal already.
            judge: Extracts answers from generations and scores them; or a `ChoiceJudge`, for
                scores of choices, whose files have more columns (`SCORE_SCHEMA`).
            asked_for: Options of the engine that ask for more columns (`ASKED_FOR`).

        Raises:
            OutputError: If the output cannot be written, is being written by another process, or
                exists and ``mode`` does not allow it; or if the run cannot be resumed.
            RequestError: If two requests have the same uuid.
        """
        output = writable_path(Path(path))
        journal = Journal.acquire(output)
        try:
            earlier = find_earlier(output, journal, mode)
            if earlier is not None:
                earlier.check_same_run(config)
                config = config.resuming(earlier.config)
            expanded = ExpandedRequests(requests, fusion)
            columns = schema_of(judge, fusion, asked_for)
            plan = make_plan(expanded, earlier, output, judge, columns)
            if config.shard is not None:
                config = replace(config, num_rows=len(plan.has_row))
            schema = columns.with_metadata({RUN: config.to_json()})
            if not plan.is_complete:
                journal.restart(schema, plan.rows)
            writer = cls(output, journal, schema, expanded, fusion.after_expansion, plan, judge)
            writer.write(plan.bad)
            return writer
        except BaseException:
            journal.close()
            raise

    def write(self, results: Iterable[Result]) -> None:
        """Append rows in any order; after return they survive a crash.

        Raises:
            OutputError: If the disk is full or fails; the rows of earlier calls are safe.
            ValueError: If a row belongs to no remaining request, or is written twice.
        """
        rows = [row_of(result, self.judge) for result in results]
        given = [key_of(row) for row in rows]
        if len(set(given)) < len(given) or not self._pending.issuperset(given):
            raise ValueError(f"every remaining request takes one row, got {given}")
        if rows:
            columns = self._schema.remove_metadata()
            batch = pa.RecordBatch.from_pylist(rows, schema=columns)
            self._journal.append(batch)
            self._pending.difference_update(given)
            self.summary = self.summary.plus(
                [row["correct"] for row in rows], [row["finish_reason"] for row in rows]
            )

    @property
    def is_complete(self) -> bool:
        """True if every row is written."""
        return not self._pending

    def __enter__(self) -> Self:
        """Return the writer; `open` has locked the output already."""
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write the result file on a clean exit; keep the journal after an exception.

        Raises:
            OutputError: If rows are missing on a clean exit, or the file cannot be written.
        """
        if exception_type is not None or self._is_untouched:
            self.suspend()
            return
        is_needed = self.summary.rows > 0
        try:
            self._finish()
            is_needed = False
        finally:
            self._journal.close(keep=is_needed)

    def suspend(self) -> None:
        """Close without writing the result file; the journal keeps the finished rows."""
        self._journal.close(keep=not self._is_untouched and self.summary.rows > 0)

    def _finish(self) -> None:
        if not self.is_complete:
            raise OutputError(
                f"{self._output}: {len(self._pending)} of {len(self._order)} requests have no "
                "row yet; pass `resume` to generate them"
            )
        content = self._journal.read()
        rows = content.rows
        if content.loss or Counter(keys(rows)) != Counter(self._order):
            raise OutputError(
                f"{self._journal.path}: damaged while it was written: {rows.num_rows:,} of "
                f"{len(self._order):,} rows are intact; `resume` generates the others again"
            )
        write_rows(self._output, self._schema, _in_order(rows, self._order))


def check_output(path: str | Path, mode: OutputMode, config: RunConfig | None = None) -> None:
    """Check that a run can write its result, before anything costly.

    Missing folders are created, and a temporary file is written into the output's folder.

    Args:
        path: The output.
        mode: What to do if there is a result or a journal already.
        config: The run's configuration, which a resumed result must have too.

    Raises:
        OutputError: If the output cannot be written, is being written by another process, or
            exists and ``mode`` does not allow it; the message says what to do.
    """
    output = writable_path(Path(path))
    journal = Journal.acquire(output)
    try:
        earlier = find_earlier(output, journal, mode)
        if earlier is not None and config is not None:
            earlier.check_same_run(config)
    finally:
        journal.close()


def read_finished_rows(path: str | Path) -> pa.Table:
    """Read a result file, or the journal of a run that was interrupted or is in progress.

    Of a journal that ends in the middle of a write, the rows before that write are returned; of a
    damaged one, the rows before the damage, with a warning.

    Returns:
        A table with the columns of one of `SCHEMAS`, and the run in its metadata
        (`read_run_config`).

    Raises:
        OutputError: If there is no such file, or it is not a result file.
    """
    path = Path(path)
    content = read_rows(path)
    if content.tail == "damaged":
        warnings.warn(f"{path}: {content.loss}", FlexMaskWarning, stacklevel=2)
    return EarlierRun.of(path, content.rows).rows


def read_run_config(path: str | Path) -> RunConfig:
    """Read the run configuration recorded in a result file or a journal.

    Raises:
        OutputError: If there is no such file, or it is not a result file.
    """
    path = Path(path)
    return EarlierRun.of(path, read_rows(path).rows).config


def _in_order(rows: pa.Table, order: Iterable[RequestKey]) -> Iterator[pa.Table]:
    """Yield the rows sorted by ``order``, some at a time.

    They are sliced, because `Table.take` fails on columns of more than 2 GiB of text.
    """
    batches = rows.to_batches()
    index_of = {
        key: (number, index)
        for number, batch in enumerate(batches)
        for index, key in enumerate(keys(batch))
    }
    indices = (index_of[key] for key in order)
    while some := list(islice(indices, ROWS_PER_BATCH)):
        yield pa.Table.from_batches(
            batches[number].slice(start, length) for number, start, length in _spans(some)
        ).combine_chunks()


def _spans(indices: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Group row indices into spans of consecutive rows: batch number, start and length."""
    number, start = indices[0]
    length = 0
    for index in indices:
        if index == (number, start + length):
            length += 1
        else:
            yield number, start, length
            (number, start), length = index, 1
    yield number, start, length
