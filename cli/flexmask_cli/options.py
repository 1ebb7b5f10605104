"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from flexmask.errors import OptionError

StrategyName = Annotated[
    str, typer.Option("--strategy", "-s", help="Mask strategy; see 'flexmask strategies'.")
]
Parameters = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", metavar="KEY=VALUE", help="Parameter of the strategy."),
]


def split_pairs(pairs: Sequence[str], option: str, form: str) -> dict[str, str]:
    """Turn texts with a ``=`` into a mapping.

    Args:
        pairs: The texts.
        option: What they were given to, such as ``--param``.
        form: What they should look like, such as ``KEY=VALUE``.

    Raises:
        OptionError: If a text has no ``=``, or a key stands twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise OptionError(f"{option} takes {form}, got {pair!r}")
        if name in found:
            raise OptionError(f"{option} {name} is given twice")
        found[name] = value
    return found


def parse_parameters(pairs: Sequence[str]) -> dict[str, str]:
    """The parameters of a strategy by name."""
    return split_pairs(pairs, "--param", "KEY=VALUE")
