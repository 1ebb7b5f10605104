"""Progress of a run on stderr: a bar on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from flexmask.printable import WORDS, printable
from flexmask_cli.streams import write_note

if TYPE_CHECKING:
    from flexmask.engine import RunStats
    from flexmask_cli.interrupt import Interrupt

SECONDS_PER_LINE = 5.0

Made = TypeVar("Made", covariant=True)


class HasStats(Protocol):
    """A run of the engine."""

    @property
    def stats(self) -> RunStats:
        """Counts and times so far."""


class TrackedRun(Protocol[Made]):
    """A run whose progress is shown, such as a `DatasetRun`."""

    @property
    def engine_run(self) -> HasStats:
        """The engine's run, with its counts."""

    def batches(self, should_stop: Callable[[], bool]) -> Iterator[Sequence[Made]]:
        """Yield results as they finish; end after those in flight once ``should_stop``."""


class Pace:
    """Rows and tokens per second of wall-clock time.

    The first prompts, which wait for compilation, are left out once others have finished.
    """

    def __init__(self, total: int, start: float) -> None:
        """Start at ``start``, in seconds of `time.monotonic`."""
        self._total = total
        self._since = (start, 0, 0)
        self._now = self._since
        self._warm_since: tuple[float, int, int] | None = None

    def update(self, stats: RunStats, rows: int, now: float) -> None:
        """Record that ``rows`` rows are finished."""
        self._since = self._warm_since or self._since
        self._now = (now, rows, stats.generated_tokens or stats.computed_tokens)
        if self._warm_since is None and not stats.cold_groups:
            self._warm_since = self._now

    @property
    def rows(self) -> int:
        """Number of finished rows."""
        return self._now[1]

    @property
    def rows_per_s(self) -> float:
        """Rows per second."""
        return self._per_second(1)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second; computed ones where nothing is generated."""
        return self._per_second(2)

    @property
    def left_s(self) -> float:
        """Estimated seconds for the remaining rows."""
        return (self._total - self.rows) / self.rows_per_s if self.rows_per_s else 0.0

    def _per_second(self, count: int) -> float:
        seconds = self._now[0] - self._since[0]
        return (self._now[count] - self._since[count]) / seconds if seconds > 0 else 0.0

    def line(self, stats: RunStats) -> str:
        """Return the progress as one line."""
        minutes, seconds = divmod(round(self.left_s), 60)
        return (
            f"{self.rows:,} of {self._total:,} rows, {self.rows_per_s:.1f} rows/s, "
            f"{self.tokens_per_s:,.0f} tokens/s, batches of {stats.batch_size}, "
            f"{minutes}:{seconds:02} left"
        )


def track(
    run: TrackedRun[Made], total: int, interrupt: Interrupt, *, is_quiet: bool, title: str = ""
) -> Iterator[Sequence[Made]]:
    """Yield the batches of a run, and show rows, tokens per second and time left.

    Args:
        run: The run.
        total: Number of rows that it will have.
        interrupt: Stops the run after a batch, if requested.
        is_quiet: True to show nothing.
        title: Name of the run, if it is one of several.
    """
    batches = run.batches(lambda: interrupt.is_requested)
    if is_quiet:
        return batches
    shown = _with_bar if sys.stderr.isatty() else _with_lines
    return shown(batches, run, total, title)


def _with_lines(
    batches: Iterator[Sequence[Made]], run: TrackedRun[Made], total: int, title: str
) -> Iterator[Sequence[Made]]:
    if title:
        write_note(f"note: {title}")
    pace = Pace(total, shown_at := time.monotonic())
    rows = 0
    for batch in batches:
        rows += len(batch)
        now = time.monotonic()
        pace.update(run.engine_run.stats, rows, now)
        if now - shown_at >= SECONDS_PER_LINE:
            write_note(pace.line(run.engine_run.stats))
            shown_at = now
        yield batch


def _with_bar(
    batches: Iterator[Sequence[Made]], run: TrackedRun[Made], total: int, title: str
) -> Iterator[Sequence[Made]]:
    """Show a bar that is erased at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    pace = Pace(total, time.monotonic())
    rows = 0
    columns = (BarColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        named = f"{printable(title, WORDS)}: " if title else ""
        task = progress.add_task(f"{named}compiling, then the first batch", total=total)
        for batch in batches:
            rows += len(batch)
            pace.update(run.engine_run.stats, rows, time.monotonic())
            description = named + pace.line(run.engine_run.stats)
            progress.update(task, completed=rows, description=description)
            yield batch
