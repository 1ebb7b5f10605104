"""What all figures share: matplotlib itself, sizes and settings."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from flexmask.errors import FlexMaskError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_IN = 3.3
"""One column of a paper."""
FONT_PT = 7

SETTINGS: dict[Any, Any] = {
    "font.size": FONT_PT,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a parameter may hold a dollar sign
    "svg.hashsalt": "flexmask",  # the same picture makes the same file
    "pdf.fonttype": 42,  # Type 3 fonts, the default, are refused by many venues
}


def new_axes(height_in: float) -> Axes:
    """An axis of one column's width in a figure of its own, which notebooks show."""
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(WIDTH_IN, height_in), layout="constrained", dpi=200)
    return ax


def check_matplotlib() -> None:
    """Find out whether figures can be drawn.

    Raises:
        FlexMaskError: If matplotlib is not installed; the message says how to get it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FlexMaskError(
            "figures need matplotlib: pip install 'flexmask[plot]'; the terminal picture and "
            "-o mask.html need nothing"
        ) from None


def figure_settings() -> AbstractContextManager[None]:
    """What holds while a figure is drawn."""
    import matplotlib

    return matplotlib.rc_context(SETTINGS)
