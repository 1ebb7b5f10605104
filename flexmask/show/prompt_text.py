"""Formats a request's tokens for the terminal: by part, with positions under them."""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len
from rich.text import Text

from flexmask.printable import printable
from flexmask.show.palette import part_colour
from flexmask.show.tokens import Band, DrawnTokens

MAX_LINES = 3
"""Most lines of tokens per part; of longer parts the middle is left out."""

INDENT = 4


def prompt_text(tokens: DrawnTokens, columns: int) -> Text:
    """Format every part in its colour, with the positions of its tokens.

    Args:
        tokens: The tokens.
        columns: Width of the terminal in characters.
    """
    lines = []
    for band in tokens.bands:
        lines.append(_heading(tokens, band))
        if tokens.texts:
            lines += _token_lines(tokens, band, columns)
    return Text("\n").join(lines)


def _heading(tokens: DrawnTokens, band: Band) -> Text:
    first, last = tokens.position_ids[band.start], tokens.position_ids[band.stop - 1]
    where = f"position {first}" if first == last else f"positions {first} to {last}"
    count = "1 token" if len(band) == 1 else f"{len(band):,} tokens"
    heading = Text(f"{band.label:<{INDENT - 1}} ", _style(band) + " bold")
    heading.append(f"{count}, slots from {band.start}, {where}", "not bold")
    if band.start == tokens.tail_start:
        heading.append("; the fusion tail starts here", "not bold")
    return heading


def _token_lines(tokens: DrawnTokens, band: Band, columns: int) -> Iterator[Text]:
    lines = list(_wrapped(tokens, band, max(columns - INDENT, 20)))
    left_out = 0
    if len(lines) > MAX_LINES:
        left_out = sum(len(line) for line in lines[MAX_LINES - 1 : -1])
        lines = [*lines[: MAX_LINES - 1], [], lines[-1]]
    for line in lines:
        if not line:
            yield Text(" " * INDENT + f"... {left_out:,} tokens more", "dim")
            continue
        widths = [cell_len(text) + 1 for _, text, _ in line]
        above, below = Text(" " * INDENT), Text(" " * INDENT)
        for (number, text, position), width in zip(line, widths, strict=True):
            padding = max(width, len(position) + 1)
            style = _style(band) + (" reverse" if number % 2 else "")
            above.append(text, style).append(" " * (padding - cell_len(text)))
            below.append(f"{position:<{padding}}", "dim")
        yield above
        yield below


def _wrapped(
    tokens: DrawnTokens, band: Band, columns: int
) -> Iterator[list[tuple[int, str, str]]]:
    """Yield lines of (slot, text, position) that fit into ``columns``."""
    line: list[tuple[int, str, str]] = []
    used = 0
    for slot in range(band.start, band.stop):
        text, position = printable(tokens.texts[slot]) or '""', str(tokens.position_ids[slot])
        width = max(cell_len(text), len(position)) + 1
        if line and used + width > columns:
            yield line
            line, used = [], 0
        line.append((slot, text, position))
        used += width
    yield line


def _style(band: Band) -> str:
    return part_colour(band.segment_id, band.is_generated)
