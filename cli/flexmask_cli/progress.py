"""Progress of a run on stderr: a bar on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flexmask.printable import WORDS, printable
from flexmask_cli.streams import write_note

if TYPE_CHECKING:
    from flexmask.engine import RunStats
    from flexmask.generation import Generation
    from flexmask.results.dataset_run import DatasetRun
    from flexmask_cli.interrupt import Interrupt

SECONDS_PER_LINE = 5.0


class Pace:
    """Rows and tokens per second, by the clock on the wall.

    The first batch compiles; once there is a second one, it is left out.
    """

    def __init__(self, total: int, start: float) -> None:
        """Begin at ``start``, in seconds of `time.monotonic`."""
        self._total = total
        self._since = (start, 0, 0)
        self._now = self._since
        self._batches = 0

    def update(self, stats: RunStats, rows: int, now: float) -> None:
        """Note that ``rows`` are finished."""
        self._batches += 1
        if self._batches == 2:
            self._since = self._now
        self._now = (now, rows, stats.generated_tokens)

    @property
    def rows(self) -> int:
        """Rows finished."""
        return self._now[1]

    @property
    def rows_per_s(self) -> float:
        """Rows per second."""
        return self._per_second(1)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second."""
        return self._per_second(2)

    @property
    def left_s(self) -> float:
        """Seconds that the other rows will take."""
        return (self._total - self.rows) / self.rows_per_s if self.rows_per_s else 0.0

    def _per_second(self, count: int) -> float:
        seconds = self._now[0] - self._since[0]
        return (self._now[count] - self._since[count]) / seconds if seconds > 0 else 0.0

    def line(self, stats: RunStats) -> str:
        """All of it in words."""
        minutes, seconds = divmod(round(self.left_s), 60)
        return (
            f"{self.rows:,} of {self._total:,} rows, {self.rows_per_s:.1f} rows/s, "
            f"{self.tokens_per_s:,.0f} tokens/s, batches of {stats.batch_size}, "
            f"{minutes}:{seconds:02} left"
        )


def track(
    run: DatasetRun, total: int, interrupt: Interrupt, *, is_quiet: bool, title: str = ""
) -> Iterator[Sequence[Generation]]:
    """Pass the batches of a run on and show rows, tokens per second and time left.

    Args:
        run: The run.
        total: How many rows it will have.
        interrupt: Ends the run after a batch.
        is_quiet: Show nothing.
        title: Names the run, where it is one of several.
    """
    batches = run.batches(lambda: interrupt.is_requested)
    if is_quiet:
        return batches
    shown = _with_bar if sys.stderr.isatty() else _with_lines
    return shown(batches, run, total, title)


def _with_lines(
    batches: Iterator[Sequence[Generation]], run: DatasetRun, total: int, title: str
) -> Iterator[Sequence[Generation]]:
    if title:
        write_note(f"note: {title}")
    pace = Pace(total, shown_at := time.monotonic())
    rows = 0
    for batch in batches:
        rows += len(batch)
        now = time.monotonic()
        pace.update(run.generations.stats, rows, now)
        if now - shown_at >= SECONDS_PER_LINE:
            write_note(pace.line(run.generations.stats))
            shown_at = now
        yield batch


def _with_bar(
    batches: Iterator[Sequence[Generation]], run: DatasetRun, total: int, title: str
) -> Iterator[Sequence[Generation]]:
    """Show a bar and nothing that stays once it is full."""
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
            pace.update(run.generations.stats, rows, time.monotonic())
            description = named + pace.line(run.generations.stats)
            progress.update(task, completed=rows, description=description)
            yield batch
