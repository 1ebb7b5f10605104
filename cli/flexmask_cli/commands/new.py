"""``flexmask new``: writes a plugin to start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from flexmask.errors import OptionError
from flexmask.plugins.new_plugin import PluginNames, write_plugin
from flexmask_cli.option_groups import takes_options
from flexmask_cli.option_kinds import path
from flexmask_cli.options import AsJson
from flexmask_cli.render.lines import print_json, print_line
from flexmask_cli.strategy_choice import load_plugins


@dataclass(frozen=True)
class NewOptions:
    """The plugin to write."""

    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the distribution, such as my-strategy.")
    ]
    directory: Annotated[
        Path | None,
        path("--directory", help="Folder to write it to. Default: a folder of its name."),
    ] = None
    as_json: AsJson = False


@takes_options
def new(*, options: NewOptions) -> None:
    """Write a plugin with a working strategy, to start from."""
    names = PluginNames.of(options.name)
    if names.strategy in {item.cls.name for item in load_plugins().strategies()}:
        raise OptionError(f"strategy {names.strategy!r} is there already; choose another name")
    folder = options.directory or Path(names.distribution)
    write_plugin(names, folder)
    commands = [
        f"pip install -e {folder}",
        f"flexmask check {names.strategy}",
        f"flexmask generate --strategy {names.strategy}",
    ]
    if options.as_json:
        files = sorted(str(file) for file in folder.iterdir())
        print_json(
            {"strategy": names.strategy, "folder": str(folder), "files": files, "next": commands}
        )
        return
    print_line(f"wrote {folder}: strategy {names.strategy!r} in {names.module}.py")
    print_line("next:")
    for command in commands:
        print_line(f"  {command}")
