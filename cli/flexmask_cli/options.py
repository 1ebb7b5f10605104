"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from flexmask.errors import OptionError

StrategyName = Annotated[
    str,
    typer.Option(
        "--strategy",
        "-s",
        help="Mask strategy; see 'flexmask strategies'. Or one in a file: path/to/file.py:name.",
    ),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", metavar="KEY=VALUE", help="Parameter of the strategy."),
]


def parse_parameters(pairs: Sequence[str]) -> dict[str, str]:
    """Turn ``KEY=VALUE`` texts into a mapping.

    Raises:
        OptionError: If a text has no ``=``, or a key stands twice.
    """
    parameters: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise OptionError(f"--param takes KEY=VALUE, got {pair!r}")
        if name in parameters:
            raise OptionError(f"--param {name} is given twice")
        parameters[name] = value
    return parameters
