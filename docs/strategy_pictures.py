"""Draws the mask of every built-in strategy, and two of them side by side: ``make docs``."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from flexmask.plugins.registry import BUILT_IN, load_registry, make_strategy
from flexmask.show.figure import plot_mask, save_figure
from flexmask.show.mask_picture import draw_mask
from flexmask.show.plotting import figure_settings
from flexmask.show.tokens import ShownRequest
from flexmask.strategy import ParameterValue, Strategy

SHOWN = ShownRequest.of_lengths(prefix=4, segments=(5, 4, 5), suffix=2, new_tokens=2)

FOLDER = Path(__file__).with_name("strategies")
COMPARED = {
    "causal": "ordinary causal attention",
    "prefix_segment": "segments isolated, fused by the tail",
}

PARAMETERS: dict[str, dict[str, ParameterValue]] = {
    "boundary_repair": {"link_tokens": 2},
    "sliding_window": {"window": 5, "sinks": 2},
    "dilated": {"window": 4, "dilation": 3},
    "strided": {"stride": 5},
    "global_window": {"window": 5},
}
"""Parameters for strategies whose defaults are too large for so small a request."""


def pictured(name: str) -> Strategy:
    """Return the strategy with the parameters of its picture."""
    return make_strategy(name, PARAMETERS.get(name, {}))


def side_by_side(path: Path) -> None:
    """Draw ordinary causal attention beside isolated segments."""
    with figure_settings():
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        for ax, (name, title) in zip(figure.subplots(1, 2), COMPARED.items(), strict=True):
            plot_mask(draw_mask(pictured(name), SHOWN), ax)
            ax.set_title(title, pad=30)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Write the SVG files."""
    for registered in load_registry().strategies():
        if registered.owner.distribution == BUILT_IN:
            name = registered.cls.name
            save_figure(draw_mask(pictured(name), SHOWN), FOLDER / f"{name}.svg")
    side_by_side(FOLDER.with_name("two-masks.svg"))


if __name__ == "__main__":
    main()
