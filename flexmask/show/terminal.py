"""Renders pictures in the terminal: half blocks, coloured or not, or plain ASCII."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text

from flexmask.show.cells import COLOURS, CellGrid, CellState, cell_grid
from flexmask.show.mask_picture import Picture
from flexmask.show.palette import ink_on, part_colour
from flexmask.show.tokens import Band, DrawnTokens

ASCII = {
    CellState.MASKED: ".",
    CellState.SKIPPED: ".",
    CellState.SEEN: "#",
    CellState.PARTIAL: "+",
    CellState.FULL: "#",
    CellState.SAME: "=",
    CellState.ONLY_FIRST: "<",
    CellState.ONLY_SECOND: ">",
    CellState.EITHER: "x",
}
"""The character of each state; masked pairs look the same in computed and skipped tiles."""

BLANK = (CellState.MASKED, CellState.SKIPPED)
"""States drawn as the terminal's background."""

MIN_CELLS = 16
MARGIN = 4
"""Width of the row labels in columns."""
OTHER_LINES = 4
"""Lines besides the picture: title, column labels, legend, and the shell's next prompt."""


def ascii_picture(picture: Picture, columns: int) -> str:
    """Draw one character per cell, with the part of the first token of each row and column."""
    grid = cell_grid(picture, _side(picture, columns - MARGIN))
    labels = [band.label.removeprefix("S") for band in _first_bands(picture.tokens, grid.side)]
    lines = ["   " + "".join(label[-1] for label in labels)]
    for label, row in zip(labels, grid.cells.tolist(), strict=True):
        lines.append(f"{label[-2:]:>2} " + "".join(ASCII[CellState(cell)] for cell in row))
    meanings = {ASCII[cell]: meaning for cell, meaning in reversed(grid.legend(picture))}
    key = ", ".join(f"{mark} {meaning}" for mark, meaning in reversed(meanings.items()))
    return "\n".join([*lines, f"{_unit(grid)}: {key}"])


def block_picture(picture: Picture, columns: int, lines: int, *, is_coloured: bool) -> Text:
    """Draw two rows of cells per line as half blocks, with labels above and on the left.

    Args:
        picture: The picture to draw.
        columns: Width of the terminal in characters.
        lines: Height of the terminal in lines.
        is_coloured: Whether the terminal shows colours.
    """
    room = min(columns - MARGIN, 2 * (lines - OTHER_LINES))
    grid = cell_grid(picture, _side(picture, room))
    bands = _first_bands(picture.tokens, grid.side)
    styles = _cell_styles(picture, grid) if is_coloured else _filled_cells(grid)
    text = Text(" " * MARGIN)
    for column, band in enumerate(bands):
        text.append(_letter(bands, column), _band_style(band))
    for row in range(0, len(bands), 2):
        text.append("\n")
        text.append(_row_label(bands, row), _band_style(bands[row]))
        text.append(" ")
        below = styles[row + 1] if row + 1 < len(styles) else [None] * len(styles)
        for upper, lower in zip(styles[row], below, strict=True):
            text.append(*_half_blocks(upper, lower))
    text.append("\n")
    return text.append_text(_key(picture, grid) if is_coloured else _filled_key(grid))


def _side(picture: Picture, room: int) -> int:
    """Return the side of a cell in tokens at which the picture fits."""
    return -(-picture.size // max(MIN_CELLS, room))


def _cell_styles(picture: Picture, grid: CellGrid) -> list[list[str | None]]:
    """Return the colour of each cell; None for the terminal's background."""
    cells, colours = grid.cells.tolist(), grid.colours(picture).tolist()
    return [
        [
            None if cell in BLANK else "#{:02x}{:02x}{:02x}".format(*colour)
            for cell, colour in zip(row, row_colours, strict=True)
        ]
        for row, row_colours in zip(cells, colours, strict=True)
    ]


def _filled_cells(grid: CellGrid) -> list[list[str | None]]:
    """Without colours: the terminal's foreground for cells that are seen, or that differ."""
    blank = (*BLANK, CellState.SAME)
    return [[None if cell in blank else "default" for cell in row] for row in grid.cells.tolist()]


def _half_blocks(upper: str | None, lower: str | None) -> tuple[str, str]:
    """Return one character for two cells, and its style."""
    if upper == lower:
        return ("█", upper) if upper else (" ", "")
    if not upper:
        return "▄", lower or ""
    return "▀", f"{upper} on {lower}" if lower else upper


def _first_bands(tokens: DrawnTokens, side: int) -> list[Band]:
    """Return the band of each cell's first token."""
    bands = iter(tokens.bands)
    band = next(bands)
    firsts = []
    for token in range(0, len(tokens), side):
        while token >= band.stop:
            band = next(bands)
        firsts.append(band)
    return firsts


def _letter(bands: list[Band], cell: int) -> str:
    """Return a cell's character of the band's label: one per cell from its start, then blank."""
    offset = cell - bands.index(bands[cell])
    return bands[cell].label[offset : offset + 1] or " "


def _row_label(bands: list[Band], row: int) -> str:
    """Return the label of a band on the first line where it starts."""
    first = bands.index(bands[row])
    label = bands[row].label if first >= row - 1 else ""
    return f"{label:<{MARGIN - 1}}"[: MARGIN - 1]


def _band_style(band: Band) -> Style:
    colour = part_colour(band.segment_id, band.is_generated)
    return Style(color=ink_on(colour), bgcolor=colour)


def _key(picture: Picture, grid: CellGrid) -> Text:
    text = Text(f"{_unit(grid)}:")
    for cell, meaning in grid.legend(picture):
        if cell not in BLANK:
            text.append("  ").append("█", COLOURS.get(cell, "")).append(f" {meaning}")
    return text


def _filled_key(grid: CellGrid) -> Text:
    is_difference = bool((grid.cells == CellState.SAME).any())
    filled = "the masks differ" if is_difference else "something is seen"
    return Text(f"{_unit(grid)}; where it is filled, {filled}")


def _unit(grid: CellGrid) -> str:
    each = "one token" if grid.side == 1 else f"{grid.side} tokens"
    return f"a cell is {each} (q down, kv across)"
