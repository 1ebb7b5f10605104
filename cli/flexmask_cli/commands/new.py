"""``flexmask new``: starts a plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexmask.errors import OptionError
from flexmask.plugins.new_plugin import PluginNames, write_plugin
from flexmask_cli import render
from flexmask_cli.options import path_of
from flexmask_cli.strategy_choice import load_plugins


def new(
    name: Annotated[str, typer.Argument(help="Name of the distribution, such as my-strategy.")],
    directory: Annotated[
        Path | None,
        typer.Option(
            parser=path_of("--directory"),
            metavar="PATH",
            help="Where it is written. Default: a folder of its name.",
        ),
    ] = None,
) -> None:
    """Write a plugin with a strategy that works, to be changed into yours."""
    names = PluginNames.of(name)
    if names.strategy in {item.cls.name for item in load_plugins().strategies()}:
        raise OptionError(f"strategy {names.strategy!r} is there already; choose another name")
    folder = directory or Path(names.distribution)
    write_plugin(names, folder)
    for line in (
        f"wrote {folder}: strategy {names.strategy!r} in {names.module}.py",
        "next:",
        f"  pip install -e {folder}",
        f"  flexmask check {names.strategy}",
        f"  flexmask generate --strategy {names.strategy}",
    ):
        render.print_line(line)
