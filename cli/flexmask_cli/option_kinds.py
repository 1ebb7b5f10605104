"""Kinds of options: how the text of one becomes a value, and which texts are refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer

from flexmask.errors import OptionError
from flexmask.limits import read_size

Completion = Callable[[str], list[str]]
"""Gives the values that begin with what a user has typed so far."""


class Pair(NamedTuple):
    """One ``NAME=VALUE`` of an option that is given several times."""

    name: str
    value: str


def text(
    *names: str, help: str, metavar: str = "NAME", completion: Completion | None = None
) -> Any:
    """An option that takes a text, which must not be empty."""
    return typer.Option(
        *names, help=help, metavar=metavar, callback=refuse_empty, autocompletion=completion
    )


def flag(name: str, *other_names: str, help: str) -> Any:
    """An option that is given or not."""
    return typer.Option(name, *other_names, help=help)


def size(*names: str, help: str, least: int = 1) -> Any:
    """An option that takes a number of something, ``least`` (0 or 1) or more."""

    def read(parameter: typer.CallbackParam, value: str | None) -> int | None:
        form = "a positive number" if least else "a number, 0 or more"
        if value is None:
            return None
        return read_size(option_name(parameter), value, form, least=least)

    return typer.Option(*names, help=help, metavar="N", parser=str, callback=read)


def path(*names: str, help: str) -> Any:
    """An option that takes a path."""
    return typer.Option(*names, help=help, metavar="PATH", parser=str, callback=_read_path)


def paths_argument(*, metavar: str, help: str) -> Any:
    """Paths without an option's name before them."""
    return typer.Argument(metavar=metavar, help=help, parser=str, callback=_read_paths)


def pairs(*names: str, metavar: str, help: str) -> Any:
    """An option that takes ``NAME=VALUE`` and is given several times, once for each name."""

    def read(parameter: typer.CallbackParam, values: list[str]) -> list[Pair]:
        return read_pairs(values, option_name(parameter), metavar)

    return typer.Option(*names, help=help, metavar=metavar, parser=str, callback=read)


def option_name(parameter: typer.CallbackParam) -> str:
    """The name of an option, such as ``--limit``, or of an argument, such as ``FILE``."""
    name = max(parameter.opts, key=len)
    return name if name.startswith("-") else name.upper()


def refuse_empty(parameter: typer.CallbackParam, value: str | None) -> str | None:
    """Return the value of an option.

    Raises:
        OptionError: If it is empty, as from a shell variable that is not set: it must not stand
            for a default.
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
        texts: Such as ``window=3``.
        name: The option that they were given to, such as ``--param``.
        form: What they should look like, such as ``KEY=VALUE``.

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
    """Refuse a result file that can be read only once, since its first bytes tell its format.

    Raises:
        OptionError: If it is a pipe or device.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OptionError(f"{path}: not a file but a pipe or device; write it to a file")


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8.

    Bytes of the command line that are not UTF-8 reach Python as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_path(parameter: typer.CallbackParam, value: str | None) -> Path | None:
    """Make a path of a text; Arrow opens no file whose name is not UTF-8."""
    if refuse_empty(parameter, value) is None:
        return None
    if not is_utf8(value := str(value)):
        shown = value.encode(errors="backslashreplace").decode()
        name = option_name(parameter)
        raise OptionError(f"{name} {shown}: its name is not UTF-8; choose another")
    return Path(value)


def _read_paths(parameter: typer.CallbackParam, values: list[str]) -> list[Path]:
    return [path for value in values if (path := _read_path(parameter, value))]
