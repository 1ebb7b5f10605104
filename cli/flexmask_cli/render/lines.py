"""Prints lines to stdout and stderr, and JSON."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flexmask.errors import FlexMaskWarning
from flexmask.printable import WORDS, printable, printable_json
from flexmask_cli.option_names import OPTION_NAMES
from flexmask_cli.streams import write_note, write_styled, write_text


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    write_styled(printable_json(json.dumps(value, indent=2)) + "\n")


def print_json_line(text: str) -> None:
    """Print a line of ASCII JSON."""
    write_styled(printable_json(text) + "\n")


def print_warnings(lines: Iterable[str]) -> None:
    """Print each line as a warning to stderr."""
    for line in lines:
        write_note(f"warning: {OPTION_NAMES.shown(line)}")


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print each of flexmask's warnings once, as one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("once", FlexMaskWarning)
        show = warnings.showwarning

        def print_or_show(
            message: Warning | str, category: type[Warning], *where: Any, **more: Any
        ) -> None:
            if issubclass(category, FlexMaskWarning):
                print_warnings([str(message)])
            else:
                show(message, category, *where, **more)

        warnings.showwarning = print_or_show
        yield


def print_passing(text: str) -> None:
    """Show a status text on a terminal, in place of the previous one; an empty text clears it."""
    erase_rest = "\x1b[K"
    if sys.stdout.isatty():
        write_styled(f"{printable(text, WORDS)}{erase_rest}\r")


def print_note(line: str) -> None:
    """Print a note to stderr."""
    write_note(f"note: {line}")


def print_fault() -> None:
    """Print the traceback of the current exception to stderr."""
    for line in traceback.format_exc().splitlines():
        write_note(line)


def print_line(line: str) -> None:
    """Print a line to stdout."""
    write_text(line)


def print_figures(figures: Mapping[str, str | int | float]) -> None:
    """Print named figures, one per line."""
    width = max(map(len, figures))
    for name, value in figures.items():
        formats = {int: ",", float: ".4g", str: ""}
        text = format(value, formats[type(value)])
        write_text(f"{name.replace('_', ' '):{width}}  {text:>14}")
