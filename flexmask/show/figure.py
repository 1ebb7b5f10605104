"""Renders pictures as figures for papers and notebooks with matplotlib: PNG, SVG and PDF."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flexmask.show.cells import COLOURS, CellGrid, cell_grid
from flexmask.show.mask_picture import MaskDifference, MaskPicture, Picture, cell_side
from flexmask.show.palette import MASKED_COLOUR, part_colour, rgb
from flexmask.show.plotting import (
    FONT_PT,
    WIDTH_IN,
    check_matplotlib,
    figure_settings,
    new_axes,
)
from flexmask.show.tile_mask import TileMask
from flexmask.show.tokens import Band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

HEIGHT_IN = 3.35
"""Height of a figure without title and legend."""
LINE_IN = 0.14
DPI = 400

MAX_TOKENS = 1024
"""Most tokens that are drawn one by one: about two dots each in a printed column."""
MAX_SQUARES = 64
"""Most cells along an axis that are drawn as squares with gaps between them."""
MAX_CELLS = 512
GAP_PT = 0.4
IMAGE_DOTS = 1024
"""Fewest dots along an axis in the image of a larger mask; viewers blur smaller images."""

LINE_CHARACTERS = 44
"""Characters of titles and labels that fit in a line."""
TITLE_PAD_PT = 25
"""Space between axis and title for the bands and their labels."""
BAND = 0.045
"""Thickness of the bands of parts, as a share of the axis."""


def save_figure(picture: Picture, path: Path) -> None:
    """Write a figure; the format follows the file's extension.

    Raises:
        FlexMaskError: If matplotlib is not installed.
    """
    figure = mask_figure(picture)
    without_date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with figure_settings():
        figure.savefig(path, dpi=DPI, metadata=without_date.get(path.suffix.lower()))


def mask_figure(picture: Picture) -> Figure:
    """Draw a figure one column wide, without opening a window.

    Raises:
        FlexMaskError: If matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    grid = _grid(picture)
    with figure_settings():
        size = (WIDTH_IN, _height_in(picture, grid))
        figure = Figure(figsize=size, layout="constrained")
        _draw(figure.add_subplot(), picture, grid)
    return figure


def plot_mask(picture: Picture, ax: Axes | None = None) -> Axes:
    """Draw a mask, queries down and keys across.

    Args:
        picture: The picture to draw.
        ax: The axes to draw on; None creates a figure one column wide.

    Raises:
        FlexMaskError: If matplotlib is not installed.
    """
    check_matplotlib()
    grid = _grid(picture)
    with figure_settings():
        ax = ax or new_axes(_height_in(picture, grid))
        _draw(ax, picture, grid)
    return ax


def _height_in(picture: Picture, grid: CellGrid) -> float:
    """Return the height of a figure one column wide, with space for title and legend."""
    meanings = [_wrapped(meaning) for _, meaning in grid.legend(picture)]
    rows = -(-len(meanings) // _legend_columns(picture))
    texts = [_title(picture), _figures(picture, grid), *meanings]
    lines = "".join(texts).count("\n") + 2 + rows
    return HEIGHT_IN + LINE_IN * lines


def _legend_columns(picture: Picture) -> int:
    return 1 if isinstance(picture, MaskDifference) else 2


def _grid(picture: Picture) -> CellGrid:
    if isinstance(picture, MaskDifference):  # not computed by any kernel, so it has no tiles
        return cell_grid(picture, cell_side(picture.size, 1, MAX_TOKENS, MAX_CELLS))
    return cell_grid(picture, cell_side(picture.size, picture.mask.tile, MAX_TOKENS, MAX_CELLS))


def _draw(ax: Axes, picture: Picture, grid: CellGrid) -> None:
    _draw_cells(ax, picture, grid)
    if isinstance(picture, MaskPicture) and grid.side == 1:
        _draw_tile_lines(ax, picture.mask)
    _draw_bands(ax, picture)
    _name_axes(ax, picture)
    _draw_legend(ax, picture, grid)


def _draw_cells(ax: Axes, picture: Picture, grid: CellGrid) -> None:
    colours = grid.colours(picture).numpy()
    if len(colours) <= MAX_SQUARES:
        _draw_squares(ax, colours, grid.side)
    else:
        dots = -(-IMAGE_DOTS // len(colours))
        image = colours.repeat(dots, 0).repeat(dots, 1)
        extent = len(colours) * grid.side  # the last cell may extend past the last token
        ax.imshow(image, extent=(0, extent, extent, 0), interpolation="none")
    ax.set(xlim=(0, picture.size), ylim=(picture.size, 0), aspect="equal", anchor="N")


def _draw_squares(ax: Axes, colours: NDArray[np.uint8], side: int) -> None:
    """Draw cells as squares: one path per colour, which keeps vector files small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    for colour in np.unique(colours.reshape(-1, 3), axis=0):
        if tuple(colour) == rgb(MASKED_COLOUR):
            continue  # the background
        x0, y0, x1, y1 = (_rectangles((colours == colour).all(-1)) * side).T
        points = np.stack((x0, y0, x1, y0, x1, y1, x0, y1, x0, y0), -1).reshape(-1, 2)
        outline = Outline(points, codes * len(x0))
        ax.add_patch(PathPatch(outline, facecolor=colour / 255, linewidth=0))
    edges = [edge * side for edge in range(1, len(colours))]
    last = len(colours) * side
    lines = [((0, edge), (last, edge)) for edge in edges]
    lines += [((edge, 0), (edge, last)) for edge in edges]
    outline = Outline(np.reshape(lines, (-1, 2)), [Outline.MOVETO, Outline.LINETO] * len(lines))
    ax.add_patch(PathPatch(outline, edgecolor=MASKED_COLOUR, fill=False, linewidth=GAP_PT))


def _rectangles(shown: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Merge adjacent cells of each row into rectangles: (left, top, right, bottom)."""
    steps = np.diff(np.pad(shown, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, left = np.nonzero(steps == 1)
    _, right = np.nonzero(steps == -1)
    return np.stack((left, row, right, row + 1), -1)


def _draw_tile_lines(ax: Axes, mask: TileMask) -> None:
    for edge in range(mask.tile, mask.size, mask.tile):
        for draw in (ax.axhline, ax.axvline):
            draw(edge, color="#000000", linewidth=0.35, alpha=0.55)


def _draw_bands(ax: Axes, picture: Picture) -> None:
    from matplotlib.patches import Rectangle

    bands = picture.tokens.bands
    thick = BAND * picture.size
    start = -1.35 * thick
    for band in bands:
        colour = part_colour(band.segment_id, band.is_generated)
        for corner, width, height in (
            ((band.start, start), len(band), thick),
            ((start, band.start), thick, len(band)),
        ):
            ax.add_patch(
                Rectangle(corner, width, height, color=colour, linewidth=0, clip_on=False)
            )
    for middle, label in _labels(bands, lambda label: 0.01 + 0.0125 * len(label)):
        ax.text(middle, -1.7 * thick, label, ha="center", va="bottom")
    for middle, label in _labels(bands, lambda label: 0.021):
        ax.text(-1.7 * thick, middle, label, ha="right", va="center")


def _labels(
    bands: Sequence[Band], half_width: Callable[[str], float]
) -> Iterator[tuple[float, str]]:
    """Yield position and text of the labels that fit along an axis without overlap.

    Args:
        bands: The bands to label.
        half_width: Returns half the width of a label, as a share of the axis.
    """
    size, labelled = bands[-1].stop, 0.0
    for band in bands:
        middle, room = (band.start + band.stop) / 2, half_width(band.label) * size
        if middle - room >= labelled or not labelled:
            yield middle, band.label
            labelled = middle + room


def _name_axes(ax: Axes, picture: Picture) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.tick_params(length=2, width=0.5, pad=1.5, labelsize=FONT_PT - 1)
    ax.xaxis.set_ticks_position("bottom")
    ax.yaxis.set_ticks_position("right")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
        if picture.size > 9_999:
            axis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:g}k" if tokens else "0")
    ax.spines[:].set(linewidth=0.5)
    ax.set_xlabel("key", labelpad=2)
    ax.set_ylabel("query", labelpad=4)
    ax.yaxis.set_label_position("right")
    ax.set_title(_title(picture), fontsize=FONT_PT + 1, pad=TITLE_PAD_PT)


def _title(picture: Picture) -> str:
    lines = [picture.title]
    if isinstance(picture, MaskDifference):
        lines = [picture.first_title, f"against {picture.second_title}"]
    return "\n".join(map(_wrapped, lines))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, LINE_CHARACTERS)


def _draw_legend(ax: Axes, picture: Picture, grid: CellGrid) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    parts = {part_colour(band.segment_id, band.is_generated) for band in picture.tokens.bands}
    handles, labels = [], []
    for cell, meaning in grid.legend(picture):
        colours = [COLOURS[cell]] if cell in COLOURS else sorted(parts)[:3]
        handles.append(
            tuple(Patch(facecolor=c, edgecolor="#000000", linewidth=0.4) for c in colours)
        )
        labels.append(_wrapped(meaning))
    legend = ax.legend(
        handles=handles,
        labels=labels,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        title=_figures(picture, grid),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
        frameon=False,
        ncols=_legend_columns(picture),
        borderaxespad=0,
        handlelength=1,
        handleheight=1,
        columnspacing=1,
    )
    legend.get_title().set_multialignment("center")


def _figures(picture: Picture, grid: CellGrid) -> str:
    unit = "" if grid.side == 1 else f"\na cell is {grid.side} × {grid.side} tokens"
    if isinstance(picture, MaskDifference):
        return picture.summary.replace("; ", "\n") + unit
    report = picture.mask.report
    tiles = report.tiles_empty + report.tiles_partial + report.tiles_full
    text = f"{report.density:.1%} of pairs allowed"
    if tiles > 1:
        tile = picture.mask.tile
        text += f"; {report.tiles_empty / tiles:.0%} of {tile} × {tile} tiles skipped"
    return text if grid.side == picture.mask.tile else text + unit
