"""Kinds of options: texts, flags, sizes, paths and pairs, with their parsing and checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer

from flexmask.errors import OptionError
from flexmask.limits import read_bytes, read_size

Completion = Callable[[str], list[str]]
"""Returns the values that start with what the user has typed."""


class Pair(NamedTuple):
    """One ``NAME=VALUE`` of a repeatable option."""

    name: str
    value: str


def text(
    *names: str, help: str, metavar: str = "NAME", completion: Completion | None = None
) -> Any:
    """Declare an option that takes a text that is not empty."""
    return typer.Option(
        *names, help=help, metavar=metavar, callback=refuse_empty, autocompletion=completion
    )


def flag(name: str, *other_names: str, help: str) -> Any:
    """Declare an option without a value."""
    return typer.Option(name, *other_names, help=help)


def size(*names: str, help: str, least: int = 1) -> Any:
    """Declare an option that takes a whole number of at least ``least`` (0 or 1)."""

    def read(parameter: typer.CallbackParam, value: str | None) -> int | None:
        form = "a positive number" if least else "a number, 0 or more"
        if value is None:
            return None
        return read_size(option_name(parameter), value, form, least=least)

    return typer.Option(*names, help=help, metavar="N", parser=str, callback=read)


def byte_size(*names: str, help: str, least: int = 0) -> Any:
    """Declare an option that takes a number of bytes, such as ``8GiB``, of at least ``least``."""

    def read(parameter: typer.CallbackParam, value: str | None) -> int | None:
        if value is None:
            return None
        return read_bytes(option_name(parameter), value, least=least)

    return typer.Option(*names, help=help, metavar="SIZE", parser=str, callback=read)


def path(*names: str, help: str) -> Any:
    """Declare an option that takes a path."""
    return typer.Option(*names, help=help, metavar="PATH", parser=str, callback=_read_path)


def path_argument(*, metavar: str, help: str) -> Any:
    """Declare an argument that takes a path."""
    return typer.Argument(metavar=metavar, help=help, parser=str, callback=_read_path)


def paths_argument(*, metavar: str, help: str) -> Any:
    """Declare an argument that takes one or more paths."""
    return typer.Argument(metavar=metavar, help=help, parser=str, callback=_read_paths)


def pairs(*names: str, metavar: str, help: str) -> Any:
    """Declare a repeatable option that takes ``NAME=VALUE``, with each name at most once."""

    def read(parameter: typer.CallbackParam, values: list[str]) -> list[Pair]:
        return read_pairs(values, option_name(parameter), metavar)

    return typer.Option(*names, help=help, metavar=metavar, parser=str, callback=read)


def option_name(parameter: typer.CallbackParam) -> str:
    """Return the name of an option, such as ``--limit``, or of an argument, such as ``FILE``."""
    name = max(parameter.opts, key=len)
    return name if name.startswith("-") else name.upper()


def refuse_empty(parameter: typer.CallbackParam, value: str | None) -> str | None:
    """Return the value of an option.

    Raises:
        OptionError: If it is empty, for example from an unset shell variable. An empty value must
            not mean the default.
    """
    if value == "":
        raise OptionError(
            f"{option_name(parameter)} is empty; name something or leave it out (an unset "
            "variable?)"
        )
    return value


def read_pairs(texts: Sequence[str], name: str, form: str) -> list[Pair]:
    """Split texts at their first ``=``.

    Args:
        texts: Texts such as ``window=3``.
        name: The option, such as ``--param``.
        form: The expected form, such as ``KEY=VALUE``.

    Raises:
        OptionError: If a text has no ``=``, or two have the same name.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise OptionError(f"{name} takes {form}, got {text!r}")
        if key in found:
            raise OptionError(f"{name} {key} is given twice")
        found[key] = value
    return [Pair(*item) for item in found.items()]


def refuse_devices(path: Path) -> None:
    """Refuse a result file that can be read only once: its format is found from its first bytes.

    Raises:
        OptionError: If it is a pipe or device.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OptionError(f"{path}: not a file but a pipe or device; write it to a file")


def is_utf8(text: str) -> bool:
    """Return True if a text can be encoded as UTF-8.

    Python represents bytes of the command line that are not UTF-8 as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_path(parameter: typer.CallbackParam, value: str | None) -> Path | None:
    """Return the path that a text names; Arrow cannot open files whose name is not UTF-8."""
    if refuse_empty(parameter, value) is None:
        return None
    if not is_utf8(value := str(value)):
        shown = value.encode(errors="backslashreplace").decode()
        name = option_name(parameter)
        raise OptionError(f"{name} {shown}: its name is not UTF-8; choose another")
    return Path(value)


def _read_paths(parameter: typer.CallbackParam, values: list[str]) -> list[Path]:
    return [path for value in values if (path := _read_path(parameter, value))]
