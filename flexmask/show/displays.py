"""Renders layouts, strategies and explained masks as figures and HTML, for `flexmask.display`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexmask.block_mask import MaskReport
from flexmask.layout import Layout
from flexmask.show.figure import plot_mask
from flexmask.show.mask_picture import draw_mask
from flexmask.show.notebook import SMALL, layout_html, report_html, strategy_html
from flexmask.show.palette import part_colour
from flexmask.show.plotting import WIDTH_IN, check_matplotlib, figure_settings, new_axes
from flexmask.show.tile_pictures import plot_report
from flexmask.show.tokens import DrawnTokens
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(drawn: object, ax: Axes | None, **options: int) -> Axes:
    """Draw an object with matplotlib; a strategy by its mask for a small request.

    Raises:
        FlexMaskError: If matplotlib is not installed.
        TypeError: If there is no picture of such objects.
    """
    if isinstance(drawn, Layout):
        return plot_layout(drawn, ax)
    if isinstance(drawn, Strategy):
        return plot_mask(draw_mask(drawn, SMALL), ax)
    if isinstance(drawn, MaskReport):
        return plot_report(drawn, ax, **options)
    raise TypeError(f"there is no picture of a {type(drawn).__name__}")


def html(shown: object) -> str:
    """Render an object as HTML without scripts.

    Raises:
        TypeError: If there is no picture of such objects.
    """
    if isinstance(shown, Layout):
        return layout_html(shown)
    if isinstance(shown, Strategy):
        return strategy_html(shown)
    if isinstance(shown, MaskReport):
        return report_html(shown)
    raise TypeError(f"there is no picture of a {type(shown).__name__}")


def plot_layout(layout: Layout, ax: Axes | None = None) -> Axes:
    """Draw the position of every slot, in the colour of its part.

    Args:
        layout: The layout.
        ax: The axes to draw on; None creates a figure one column wide.

    Raises:
        FlexMaskError: If matplotlib is not installed.
    """
    check_matplotlib()
    with figure_settings():
        ax = ax or new_axes(WIDTH_IN * 0.7)
        for band in DrawnTokens.of_layout(layout).bands:
            slots = range(band.start, band.stop)
            positions = layout.position_ids[band.start : band.stop]
            colour = part_colour(band.segment_id)
            ax.plot(slots, positions, color=colour, marker=".", markersize=2, linewidth=1)
            ax.annotate(
                band.label,
                (band.stop - 1, positions[-1]),
                textcoords="offset points",
                xytext=(0, 3),
                ha="center",
                color=colour,
            )
        ax.set(xlabel="slot", ylabel="position")
    return ax
