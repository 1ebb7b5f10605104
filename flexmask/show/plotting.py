"""Settings, sizes and axes that all matplotlib figures share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from flexmask.errors import FlexMaskError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_IN = 3.3
"""Width of one column of a paper."""
FONT_PT = 7

SETTINGS: dict[Any, Any] = {
    "font.size": FONT_PT,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a parameter may contain a dollar sign
    "svg.hashsalt": "flexmask",  # makes files reproducible
    "pdf.fonttype": 42,  # Type 3 fonts, the default, are refused by many venues
}


def new_axes(height_in: float) -> Axes:
    """Create axes one column wide in a pyplot figure, which notebooks display."""
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(WIDTH_IN, height_in), layout="constrained", dpi=200)
    return ax


def check_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        FlexMaskError: If matplotlib is not installed; the message says how to install it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FlexMaskError(
            "figures need matplotlib: pip install 'flexmask[plot]'; the terminal picture and "
            "-o mask.html do not"
        ) from None


def figure_settings() -> AbstractContextManager[None]:
    """Return a context in which flexmask's matplotlib settings apply."""
    import matplotlib

    return matplotlib.rc_context(SETTINGS)
