"""Draw the mask of every built-in strategy for the README.

python docs/strategy_pictures.py docs/strategies
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flexmask.plugins.registry import BUILT_IN, load_registry, make_strategy
from flexmask.show.figure import save_figure
from flexmask.show.mask_picture import draw_mask
from flexmask.show.tokens import ShownRequest
from flexmask.strategy import ParameterValue, Strategy

SHOWN = ShownRequest.of_lengths(prefix=4, segments=(5, 4, 5), suffix=2, new_tokens=2)

PARAMETERS: dict[str, dict[str, ParameterValue]] = {
    "sliding_window": {"window": 5, "sinks": 2},
    "dilated": {"window": 4, "dilation": 3},
    "strided": {"stride": 5},
    "global_window": {"window": 5},
}
"""Where the defaults reach beyond a request as small as this."""


def pictured(name: str) -> Strategy:
    """The strategy as its picture has it."""
    return make_strategy(name, PARAMETERS.get(name, {}))


def main() -> None:
    """Write one SVG file for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for registered in load_registry().strategies():
        if registered.owner.distribution == BUILT_IN:
            picture = draw_mask(pictured(registered.cls.name), SHOWN)
            save_figure(picture, folder / f"{registered.cls.name}.svg")


if __name__ == "__main__":
    main()
