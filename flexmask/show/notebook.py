"""Renders layouts, strategies and explained masks for notebooks, as HTML without scripts."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flexmask.show.cells import cell_grid
from flexmask.show.mask_picture import cell_side, draw_mask
from flexmask.show.palette import ink_on, part_colour
from flexmask.show.tile_pictures import report_colours
from flexmask.show.tokens import DrawnTokens, ShownRequest

if TYPE_CHECKING:
    from torch import Tensor

    from flexmask.block_mask import MaskReport
    from flexmask.layout import Layout
    from flexmask.strategy import Strategy

SMALL = ShownRequest.of_lengths(prefix=6, segments=(8, 6, 7), suffix=3)
"""The request for which strategies are drawn."""

MAX_CELLS = 128
SIDE_PX = 300


def layout_html(layout: Layout) -> str:
    """Return a bar of the layout's parts, and a table of their slots and positions."""
    tokens = DrawnTokens.of_layout(layout)
    rows = []
    for band in tokens.bands:
        first, last = layout.position_ids[band.start], layout.position_ids[band.stop - 1]
        colour = part_colour(band.segment_id)
        rows.append(
            f'<tr><td style="border-left:0.6em solid {colour}">{band.label}</td>'
            f"<td>{len(band):,}</td><td>{band.start:,}–{band.stop - 1:,}</td>"
            f"<td>{first:,}–{last:,}</td></tr>"
        )
    head = "<tr><th>part</th><th>tokens</th><th>slots</th><th>positions</th></tr>"
    return f"<div>{_bar(tokens)}<table>{head}{''.join(rows)}</table></div>"


def strategy_html(strategy: Strategy) -> str:
    """Return the strategy's mask for a small request."""
    picture = draw_mask(strategy, SMALL)
    side = cell_side(picture.size, picture.mask.tile, MAX_CELLS, MAX_CELLS)
    grid = cell_grid(picture, side)
    caption = f"{picture.title}: {type(strategy).summary()}"
    return _figure(caption, _bar(picture.tokens) + _svg(grid.colours(picture), caption))


def report_html(report: MaskReport) -> str:
    """Return the tiles of an explained mask, for its first batch row and head."""
    colours, _ = report_colours(report, MAX_CELLS)
    caption = (
        f"{report.tiles_full:,} full tiles (blue), {report.tiles_partial:,} partial (orange), "
        f"{report.tiles_empty:,} empty (grey); {report.density:.1%} of pairs allowed"
    )
    return _figure(caption, _svg(colours, caption))


def _figure(caption: str, content: str) -> str:
    return (
        f'<figure style="margin:0;max-width:{SIDE_PX}px">{content}'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _bar(tokens: DrawnTokens) -> str:
    parts = ""
    for band in tokens.bands:
        colour = part_colour(band.segment_id, band.is_generated)
        parts += (
            f'<span title="{band.label}: {len(band):,} tokens" style="flex:{len(band)};'
            f"background:{colour};color:{ink_on(colour)};overflow:hidden;"
            f'text-align:center;font-size:10px">{band.label}</span>'
        )
    return f'<div style="display:flex;width:{SIDE_PX}px;margin-bottom:3px">{parts}</div>'


def _svg(colours: Tensor, label: str) -> str:
    """Draw cells as rectangles, one for adjacent cells of one colour."""
    rows, columns = colours.shape[:2]
    drawn = "".join(
        f'<rect x="{start}" y="{row}" width="{stop - start}" height="1" fill="{colour}"/>'
        for row, line in enumerate(_hex_colours(colours))
        for start, stop, colour in _same_colour(line)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(label)}" '
        f'viewBox="0 0 {columns} {rows}" width="{SIDE_PX}" height="{SIDE_PX * rows // columns}" '
        f'shape-rendering="crispEdges" style="border:1px solid #888">{drawn}</svg>'
    )


def _hex_colours(colours: Tensor) -> Iterator[list[str]]:
    for row in colours.tolist():
        yield ["#{:02x}{:02x}{:02x}".format(*colour) for colour in row]


def _same_colour(line: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    start = 0
    for stop in range(1, len(line) + 1):
        if stop == len(line) or line[stop] != line[start]:
            yield start, stop, line[start]
            start = stop
