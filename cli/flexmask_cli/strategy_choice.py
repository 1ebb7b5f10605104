"""Makes strategies from the names and parameters that the user gave."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import NamedTuple

from flexmask.errors import FlexMaskWarning, OptionError
from flexmask.plugins.registry import Registry, load_registry
from flexmask.plugins.strategy_file import classes_in_file, is_strategy_file, strategy_of_file
from flexmask.strategy import Strategy
from flexmask_cli.option_kinds import read_pairs
from flexmask_cli.render.lines import print_note, print_warnings


class ChosenStrategy(NamedTuple):
    """A strategy, and its name on the command line.

    Attributes:
        reference: Its registered name, or ``path/to/file.py:name``.
        strategy: The strategy.
    """

    reference: str
    strategy: Strategy


def load_plugins() -> Registry:
    """Load all plugins, and print warnings about their problems."""
    registry = quietly_loaded_plugins()
    print_warnings(registry.problems())
    return registry


def quietly_loaded_plugins() -> Registry:
    """Load all plugins without warnings, for a command that lists problems itself."""
    with stdout_to_stderr():
        return load_registry()


def choose_strategy(reference: str, parameters: Mapping[str, str]) -> ChosenStrategy:
    """Make a strategy by its name or from a file; a note says so of a file.

    Args:
        reference: Name of a registered strategy, or ``path/to/file.py:name``.
        parameters: Its parameters.

    Raises:
        StrategyError: If the strategy or a parameter is unknown, or a value is not allowed.
    """
    if not is_strategy_file(reference):
        load_plugins()
    return ChosenStrategy(reference, _made(reference, _strategy_class(reference), parameters))


def choose_all(reference: str, parameters: Mapping[str, str]) -> list[Strategy]:
    """Make a strategy, or all strategies of a file if no name follows its path."""
    if not is_strategy_file(reference):
        return [choose_strategy(reference, parameters).strategy]
    with _file_warnings():
        classes = classes_in_file(reference)
    return [_made(reference, cls, parameters) for cls in classes]


def choose_listed(texts: Sequence[str], shared: Mapping[str, str]) -> list[ChosenStrategy]:
    """Make strategies from texts such as ``causal,prefix_segment:positions=sequential``.

    Args:
        texts: References as `choose_strategy` takes them, separated by commas, each with
            parameters of its own after colons.
        shared: Parameters of every strategy that takes them and is given none of its own.

    Raises:
        OptionError: If no strategy takes one of the shared parameters, or a text is malformed.
        StrategyError: If a strategy or a parameter is unknown, or a value is not allowed.
    """
    chosen = []
    unused = set(shared)
    # Names do not start with a digit: a comma before one is part of a value, as in parents=0,0,1.
    for text in (name for names in texts for name in re.split(r",(?!\d)", names)):
        parts = text.strip().split(":")
        of_name = 2 if parts[0].endswith(".py") else 1
        reference = ":".join(parts[:of_name])
        cls = _strategy_class(reference)
        own = dict(read_pairs(parts[of_name:], "a strategy", "NAME:KEY=VALUE"))
        taken = {parameter.name for parameter in cls.parameters()} & shared.keys()
        values = {name: shared[name] for name in taken} | own
        chosen.append(ChosenStrategy(reference, _made(reference, cls, values)))
        unused -= taken
    if unused and len(chosen) == 1:
        chosen[0].strategy.from_parameters({name: shared[name] for name in unused})  # raises
    if unused:
        raise OptionError(f"--param {min(unused)}: none of the strategies takes it")
    return chosen


def _made(reference: str, cls: type[Strategy], parameters: Mapping[str, str]) -> Strategy:
    strategy = cls.from_parameters(parameters)
    if is_strategy_file(reference):
        print_note(
            f"strategy {strategy.name!r} runs straight from a file, {strategy.source()}; "
            "'flexmask new' starts a plugin"
        )
    return strategy


def _strategy_class(reference: str) -> type[Strategy]:
    if not is_strategy_file(reference):
        return load_registry().strategy(reference)
    with _file_warnings():
        return strategy_of_file(reference)


@contextmanager
def _file_warnings() -> Iterator[None]:
    """Print flexmask's warnings while a file runs, one line each."""
    with warnings.catch_warnings(record=True) as caught, stdout_to_stderr():
        warnings.simplefilter("always", FlexMaskWarning)
        try:
            yield
        finally:
            print_warnings(str(item.message) for item in caught)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Redirect to stderr what plugins, their C code and child processes write to stdout."""
    if sys.stdout is None or sys.stderr is None:  # closed by the caller
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
