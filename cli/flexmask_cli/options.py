"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from flexmask.errors import OptionError
from flexmask.registry import load_registry, make_strategy

if TYPE_CHECKING:
    from flexmask.strategy import Strategy

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


def parse_strategies(texts: Sequence[str], parameters: Mapping[str, str]) -> list[Strategy]:
    """Make strategies from texts such as ``causal,prefix_segment:positions=sequential``.

    Args:
        texts: Names, separated by commas, each with parameters of its own after colons.
        parameters: Given to every strategy that takes them and has none of its own.

    Raises:
        OptionError: If no strategy takes one of the parameters, or a text is malformed.
        StrategyError: If a strategy or a parameter is unknown, or a value is not allowed.
    """
    strategies = []
    unused = dict(parameters)
    for text in (name for names in texts for name in names.split(",")):
        name, *pairs = text.strip().split(":")
        taken = {parameter.name for parameter in load_registry().strategy(name).parameters()}
        shared = {key: value for key, value in parameters.items() if key in taken}
        strategies.append(make_strategy(name, shared | parse_parameters(pairs)))
        unused = {key: value for key, value in unused.items() if key not in shared}
    if unused and len(strategies) == 1:
        make_strategy(strategies[0].name, unused)  # says what the strategy takes
    if unused:
        raise OptionError(f"--param {next(iter(unused))}: none of the strategies takes it")
    return strategies


def parse_lengths(text: str) -> list[int]:
    """Turn ``40,35,38`` into numbers of tokens.

    Raises:
        OptionError: If one is not a positive number.
    """
    lengths = text.split(",")
    if not all(length.strip().isdecimal() and int(length) for length in lengths):
        raise OptionError(f"--segments must be positive numbers as in 40,35,38, got {text!r}")
    return [int(length) for length in lengths]
