"""Runs the cells of a comparison with one engine, each into a result file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmask.compare.cell import Cell, Way
from flexmask.compare.measurement import Measurement, Stopwatch
from flexmask.errors import OptionError, RequestError
from flexmask.request import Request
from flexmask.results.dataset_run import DatasetJob, DatasetRun
from flexmask.results.result_writer import ResultWriter, check_output
from flexmask.results.resume import OutputMode
from flexmask.results.schema import Result
from flexmask.tasks.request_source import BadRow, OnError

if TYPE_CHECKING:
    from flexmask.engine import Engine

Watch = Callable[[DatasetRun[Any], int], Iterable[Sequence[Any]]]
"""Yields the batches of a run and shows its progress; takes the number of rows."""


def cut_to_counts(
    requests: Iterable[Request | BadRow],
    segment_counts: Sequence[int | None],
    on_error: OnError = "stop",
) -> dict[int | None, list[Request | BadRow]]:
    """Read requests once, and shorten copies of them to each number of segments.

    Args:
        requests: Requests with all their segments.
        segment_counts: Numbers of segments to keep; None for all.
        on_error: Effect of a request with fewer segments: ``stop`` raises, ``skip`` makes it a
            bad row.

    Raises:
        RequestError: If a request has fewer segments and ``on_error`` is ``stop``, or if the
            requests cannot be read.
    """
    every = list(requests)
    return {count: [_cut(each, count, on_error) for each in every] for count in segment_counts}


def _cut(request: Request | BadRow, count: int | None, on_error: OnError) -> Request | BadRow:
    if count is None or isinstance(request, BadRow):
        return request
    try:
        return request.with_segments(count)
    except RequestError as error:
        reason = f"{request.label}: {error}"
        if on_error == "stop":
            raise RequestError(f"{reason}; lower `num_segments`") from None
        return BadRow(request.uuid, reason, request)


def without_weights(requests: Iterable[Request | BadRow]) -> list[Request | BadRow]:
    """Return the requests without their weights, for fusions that do not use them."""
    return [
        replace(request, weights=()) if isinstance(request, Request) else request
        for request in requests
    ]


@dataclass(frozen=True)
class ReportFolder:
    """The folder of a report: for each cell a result file and its times, and the page."""

    path: Path

    @property
    def page(self) -> Path:
        """Path of the page."""
        return self.path / "report.html"

    @property
    def record(self) -> Path:
        """Path of the table as JSON."""
        return self.path / "report.json"

    def rows(self, cell: Cell) -> Path:
        """Return the path of a cell's result file."""
        return self.path / f"{cell.stem}.feather"

    def times(self, cell: Cell) -> Path:
        """Return the path of a cell's measurement."""
        return self.path / f"{cell.stem}.times.json"


class _Unwritten:
    """Takes the rows of a writer's requests once more, and writes none."""

    def __init__(self, writer: ResultWriter) -> None:
        self.remaining = writer.remaining
        self.fusion = writer.fusion
        self.judge = writer.judge

    def write(self, results: Iterable[Result]) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class CellRunner:
    """Runs cells.

    Attributes:
        load_engine: Returns the engine; called only if something is left to run.
        folder: Folder of the report.
        requests_of: The requests, by their number of segments.
        job_of: Returns the run of a way, which generates or scores choices.
        mode: What to do if there is a result already.
        machine: Device and versions, recorded with the times.
    """

    load_engine: Callable[[], Engine]
    folder: ReportFolder
    requests_of: Mapping[int | None, Sequence[Request | BadRow]]
    job_of: Callable[[Way], DatasetJob[Any]]
    mode: OutputMode
    machine: Mapping[str, Any]

    def check(self, cells: Sequence[Cell]) -> None:
        """Check that all cells can be written, before anything costly.

        Raises:
            OutputError: If a result cannot be written, exists already, or is of another run.
            OptionError: If two cells would be written to one file.
        """
        by_stem: dict[str, Cell] = {}
        for cell in cells:
            other = by_stem.setdefault(cell.stem, cell)
            if other is not cell:
                raise OptionError(
                    f"{other.title} and {cell.title} would both be written to "
                    f"{self.folder.rows(cell)}; compare them in two reports"
                )
            check_output(self.folder.rows(cell), self.mode, self.job_of(cell.way).record())

    def has_result(self, cell: Cell) -> bool:
        """Return True if the cell has a result file that is not to be replaced."""
        return self.mode != "overwrite" and self.folder.rows(cell).exists()

    def run(self, cell: Cell, watch: Watch) -> None:
        """Run the remaining requests of a cell, and measure it.

        Times of an earlier run that this one resumes are kept.

        Raises:
            FlexMaskError: If the cell cannot be run.
        """
        job, requests = self.job_of(cell.way), self.requests_of[cell.way.num_segments]
        if job.fusion.weights != "column":
            requests = without_weights(requests)
        with job.open_writer(self.folder.rows(cell), requests, self.mode) as writer:
            if not writer.summary.resumed:
                self.folder.times(cell).unlink(missing_ok=True)
            if writer.remaining:
                self._carry_out(cell, job, writer, watch)

    def _carry_out(
        self, cell: Cell, job: DatasetJob[Any], writer: ResultWriter, watch: Watch
    ) -> None:
        start = partial(job.run, self.load_engine(), job.make_strategy())
        run = start(writer)
        stopwatch = Stopwatch(self.machine)
        try:
            for _ in watch(run, len(writer.remaining)):
                stopwatch.note(run.engine_run.stats)
        finally:
            measured = self._keep(cell, stopwatch.measurement)
        if measured.rows and not measured.timed_rows:
            # Its only batch compiled something.
            self._keep(cell, self._times_of(start(_Unwritten(writer))))

    def _keep(self, cell: Cell, measured: Measurement) -> Measurement:
        """Add a measurement to the earlier ones of the cell."""
        path = self.folder.times(cell)
        earlier = Measurement.read(path)
        if earlier is not None:
            measured = earlier.plus(measured)
        if measured.rows:
            measured.write(path)
        return measured

    def _times_of(self, run: DatasetRun[Any]) -> Measurement:
        """Return the times of a run in which nothing compiles any more."""
        stopwatch = Stopwatch(self.machine, is_warm=True)
        for _ in run.batches(lambda: False):
            stopwatch.note(run.engine_run.stats)
        return stopwatch.measurement.without_counts()
