"""Rows as JSON Lines on a stream, in input order, for programs that read while a run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from flexmask.fusion import Fusion
from flexmask.request import Request, RequestKey
from flexmask.results.result_writer import ExpandedRequests, Remaining, ResultSummary
from flexmask.results.resume import make_plan
from flexmask.results.schema import Result, key_of, row_of, schema_of
from flexmask.tasks.judge import ChoiceJudge, Judge
from flexmask.tasks.request_source import BadRow


class RowStream:
    """Writes the rows of one run to a stream, in place of a `ResultWriter`.

    A row is written once all rows before it are. There is no journal: a run that is interrupted
    cannot be resumed.

    Attributes:
        remaining: The requests to generate for.
        fusion: The fusion to generate for them under.
        summary: Counts over the rows so far.
        judge: Extracts answers from generations and scores them.
    """

    def __init__(
        self,
        write_line: Callable[[str], object],
        *,
        requests: Iterable[Request | BadRow],
        fusion: Fusion = Fusion(),
        judge: Judge | ChoiceJudge = Judge(),
        asked_for: Collection[str] = (),
    ) -> None:
        """Read the requests once, and write the bad rows that come first.

        Args:
            write_line: Writes a line of JSON in ASCII, given without its newline.
            requests: All requests of the run, in the order of the rows. They are iterated more
                than once.
            fusion: The fusion of the run, as for `ResultWriter.open`.
            judge: Extracts answers from generations and scores them.
            asked_for: As for `ResultWriter.open`.

        Raises:
            RequestError: If two requests have the same uuid, or the input cannot be read.
        """
        expanded = ExpandedRequests(requests, fusion)
        columns = schema_of(judge, fusion, asked_for)
        plan = make_plan(expanded, None, Path("-"), judge, columns)
        self.remaining = Remaining(expanded, plan)
        self.fusion = fusion.after_expansion
        self.summary = ResultSummary(0, 0, 0, 0)
        self.judge = judge
        self._write_line = write_line
        self._columns = columns.names
        self._order: list[RequestKey] = [*plan.has_row][::-1]
        self._waiting: dict[RequestKey, str] = {}
        self.write(plan.bad)

    def write(self, results: Iterable[Result]) -> None:
        """Take rows in any order, and write those whose turn it is.

        Raises:
            OSError: If the stream cannot be written, as when its reader has gone.
        """
        rows = [row_of(result, self.judge) for result in results]
        for row in rows:
            shown = {name: value for name, value in row.items() if name in self._columns}
            self._waiting[key_of(row)] = json.dumps(shown)
        self.summary = self.summary.plus(
            [row["correct"] for row in rows], [row["finish_reason"] for row in rows]
        )
        while self._order and self._order[-1] in self._waiting:
            self._write_line(self._waiting.pop(self._order.pop()))

    @property
    def is_complete(self) -> bool:
        """True if every row is written."""
        return not self._order
