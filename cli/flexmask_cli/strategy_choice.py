"""From what the user asked for to a strategy: loads plugins and says what went wrong with them."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout

from flexmask.errors import FlexMaskWarning, OptionError
from flexmask.plugins.registry import Registry, load_registry, make_strategy
from flexmask.plugins.strategy_file import is_strategy_file, names_in_file, strategy_of_file
from flexmask.strategy import Strategy
from flexmask_cli import render
from flexmask_cli.options import parse_parameters


def load_plugins() -> Registry:
    """Load all plugins, and print what the user should know about them."""
    with stdout_to_stderr():
        registry = load_registry()
    render.print_warnings(registry.problems())
    return registry


def choose_strategies(reference: str, pairs: Sequence[str] | None) -> list[Strategy]:
    """As `choose_strategy`; all strategies of a file where no name follows its path."""
    if not is_strategy_file(reference):
        return [choose_strategy(reference, pairs)]
    with _file_warnings():
        names = names_in_file(reference)
    return [choose_strategy(name, pairs) for name in names]


def choose_strategy(name: str, pairs: Sequence[str] | None) -> Strategy:
    """Make a strategy by its name or from a file, which is announced.

    Args:
        name: Of a registered strategy, or ``path/to/file.py:name``.
        pairs: Its parameters, as ``KEY=VALUE``.
    """
    parameters = parse_parameters(pairs or [])
    if not is_strategy_file(name):
        load_plugins()
        return make_strategy(name, parameters)
    with _file_warnings():
        strategy = make_strategy(name, parameters)
    render.print_note(
        f"strategy {strategy.name!r} runs straight from a file, {strategy.source()}; "
        "'flexmask new' starts a plugin"
    )
    return strategy


def choose_several(texts: Sequence[str], parameters: Mapping[str, str]) -> list[Strategy]:
    """As `choose_named`, the strategies alone."""
    return [strategy for _, strategy in choose_named(texts, parameters)]


def choose_named(
    texts: Sequence[str], parameters: Mapping[str, str]
) -> list[tuple[str, Strategy]]:
    """Make strategies from texts such as ``causal,prefix_segment:positions=sequential``.

    Args:
        texts: Names, or strategies of a file as ``path/to/file.py:name``, separated by commas,
            each with parameters of its own after colons.
        parameters: Given to every strategy that takes them and has none of its own.

    Returns:
        The name without parameters, and the strategy.

    Raises:
        OptionError: If no strategy takes one of the parameters, or a text is malformed.
        StrategyError: If a strategy or a parameter is unknown, or a value is not allowed.
    """
    strategies = []
    unused = dict(parameters)
    # No name begins with a digit: a comma before one is within a value, as in parents=0,0,1.
    for text in (name for names in texts for name in re.split(r",(?!\d)", names)):
        parts = text.strip().split(":")
        of_name = 2 if parts[0].endswith(".py") else 1
        name, pairs = ":".join(parts[:of_name]), parts[of_name:]
        taken = {parameter.name for parameter in _strategy_class(name).parameters()}
        shared = {key: value for key, value in parameters.items() if key in taken}
        own = shared | parse_parameters(pairs)
        strategy = choose_strategy(name, [f"{k}={v}" for k, v in own.items()])
        strategies.append((name, strategy))
        unused = {key: value for key, value in unused.items() if key not in shared}
    if unused and len(strategies) == 1:
        make_strategy(strategies[0][0], unused)  # says what the strategy takes
    if unused:
        raise OptionError(f"--param {next(iter(unused))}: none of the strategies takes it")
    return strategies


def _strategy_class(name: str) -> type[Strategy]:
    if is_strategy_file(name):
        with _file_warnings():
            return strategy_of_file(name)
    return load_registry().strategy(name)


@contextmanager
def _file_warnings() -> Iterator[None]:
    """Print what flexmask warns of while a file runs, a line each."""
    with warnings.catch_warnings(record=True) as caught, stdout_to_stderr():
        warnings.simplefilter("always", FlexMaskWarning)
        try:
            yield
        finally:
            render.print_warnings(str(item.message) for item in caught)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what a plugin's code, C code and child processes write to stdout."""
    if sys.stdout is None or sys.stderr is None:  # closed by who called
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
