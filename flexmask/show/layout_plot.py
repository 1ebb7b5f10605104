"""The position of every slot of a layout, as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexmask.show.palette import part_colour
from flexmask.show.plotting import WIDTH_IN, check_matplotlib, figure_settings, new_axes
from flexmask.show.tokens import DrawnTokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flexmask.layout import Layout


def plot_layout(layout: Layout, ax: Axes | None = None) -> Axes:
    """Draw the position of every slot, in the colour of its part.

    Args:
        layout: What to draw.
        ax: Where; None makes a figure that is one column wide.

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
