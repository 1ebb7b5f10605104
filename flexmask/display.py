"""Draws objects of the core: the one import from the core up to `flexmask.show`.

Pictures need torch, and some need matplotlib, so `flexmask.show` is imported at the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(drawn: object, ax: Axes | None = None, **options: int) -> Axes:
    """Draw a layout, a strategy or an explained mask with matplotlib.

    Args:
        drawn: The object.
        ax: Axes to draw on; None makes a figure.
        options: For an explained mask ``b`` and ``h``, the batch row and the head to draw.

    Raises:
        FlexMaskError: If matplotlib is not installed.
    """
    from flexmask.show import displays

    return displays.plot(drawn, ax, **options)


def html(shown: object) -> str:
    """Write a layout, a strategy or an explained mask as HTML for notebooks."""
    from flexmask.show import displays

    return displays.html(shown)
