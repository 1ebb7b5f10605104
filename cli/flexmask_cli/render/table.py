"""Prints tables: one plain line per row in a pipe, fitted to the width of a terminal."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from flexmask.printable import WORDS, printable
from flexmask_cli.streams import write_styled

if TYPE_CHECKING:
    from flexmask.results.evaluation import Estimate

GAP = 2
"""Spaces between columns."""

Row = Mapping[str, str]
"""Cells by the names of their columns."""


def print_table(rows: Sequence[Row], wrapped: Collection[str]) -> None:
    """Print rows as aligned columns; no cell is ever cut.

    In a pipe or file, a row is one plain line of any length. On a terminal, the columns in
    ``wrapped`` and all headings are broken between words to fit. If that does not suffice, each
    row is printed as a block with one line per column.
    """
    rows = [{name: printable(cell, WORDS) for name, cell in row.items()} for row in rows]
    if not rows:
        return
    columns = shutil.get_terminal_size().columns
    if not sys.stdout.isatty():
        lines = _plain_lines(rows)
    elif (fitted := _fitted(rows, wrapped, columns)) is not None:
        lines = iter([fitted])
    else:
        lines = _blocks(rows)
    write_styled("".join(lines))


def percent(estimate: Estimate, sign: str = "") -> str:
    """Return a mean and its 95% interval, as ``81.0% [75.5, 86.5]``; ``sign`` may be ``+``."""
    low, high = (f"{100 * end:{sign}.1f}" for end in (estimate.low, estimate.high))
    return f"{100 * estimate.mean:{sign}.1f}% [{low}, {high}]"


def _plain_lines(rows: Sequence[Row]) -> Iterator[str]:
    from rich.cells import cell_len  # slow to import

    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (
            cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)
        )
        yield (" " * GAP).join(padded).rstrip() + "\n"


def _fitted(rows: Sequence[Row], wrapped: Collection[str], columns: int) -> str | None:
    """Return the table in the styles of the terminal, or None if it is too wide."""
    from rich.console import Console
    from rich.table import Table

    widths = _column_widths(rows, wrapped, columns)
    if widths is None:
        return None
    table = Table(box=None, pad_edge=False)
    for name, width in zip(rows[0], widths, strict=True):
        table.add_column(name, width=width)
    for row in rows:
        table.add_row(*row.values())
    written = io.StringIO()
    console = Console(
        file=written,
        force_terminal=True,
        width=columns,
        height=len(rows),  # without it, rich assumes 80 columns on dumb terminals
        markup=False,
        emoji=False,
        highlight=False,
    )
    console.print(table)
    return written.getvalue()


def _column_widths(
    rows: Sequence[Row], wrapped: Collection[str], columns: int
) -> list[int] | None:
    """Return widths that fit, with the widest columns narrowed first, or None if none fit."""
    from rich.cells import cell_len

    least, natural = [], []
    for name in rows[0]:
        cells = [row[name] for row in rows]
        unbroken = [*name.split(), *(" ".join(cells).split() if name in wrapped else cells)]
        least.append(max(map(cell_len, unbroken)))
        natural.append(max(map(cell_len, [name, *cells])))
    room = columns - GAP * (len(least) - 1)
    for limit in range(max(natural), 0, -1):
        widths = [max(low, min(high, limit)) for low, high in zip(least, natural, strict=True)]
        if sum(widths) <= room:
            return widths
    return None


def _blocks(rows: Sequence[Row]) -> Iterator[str]:
    width = max(map(len, rows[0]))
    for number, row in enumerate(rows):
        if number:
            yield "\n"
        for name, cell in row.items():
            yield f"{name:{width}}  {cell}".rstrip() + "\n"
