"""Options in messages: the core names them as in Python, and here they become those of commands.

`flexmask.errors` says how a message names them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import typer

# Not after a line number and a colon, where a line of somebody's code is quoted.
_CODE = re.compile(r"(?<!\d: )`(\w+)(?:=([^`]+))?`")


class OptionNames:
    """The options of an app's commands, by the names of their parameters.

    Attributes:
        app: The app; None while no command line runs.
    """

    def __init__(self) -> None:
        """Know no options."""
        self.app: typer.Typer | None = None
        self._flags: Mapping[str, str] | None = None

    def shown(self, message: str) -> str:
        """A message in which `` `num_segments=2` `` has become ``--num-segments 2``."""
        return message if self.app is None else _CODE.sub(self._option, message)

    def _option(self, found: re.Match[str]) -> str:
        if self._flags is None:
            assert self.app is not None
            self._flags = _flags_of(typer.main.get_command(self.app))
        name, value = found.groups()
        if name not in self._flags:
            return found[0]
        return self._flags[name] if value in (None, "True") else f"{self._flags[name]} {value}"


OPTION_NAMES = OptionNames()
"""Those of the command line that this process runs; `flexmask_cli.app.main` sets its app."""


def _flags_of(command: Any) -> dict[str, str]:
    """The long form of each option by its parameter's name, those of subcommands included."""
    found = {}
    for parameter in command.params:
        long = [text for text in parameter.opts if text.startswith("--")]
        if long:  # an argument has none
            found[parameter.name] = long[0]
    for subcommand in getattr(command, "commands", {}).values():
        found |= _flags_of(subcommand)
    return found
