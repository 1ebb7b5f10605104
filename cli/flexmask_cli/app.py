"""Assembles the commands, and turns errors into messages; no other module does."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, NoReturn, cast

import typer

from flexmask import __version__
from flexmask.errors import FlexMaskError
from flexmask.plugins.registry import LOAD_PLUGINS
from flexmask.printable import LINES, WORDS, printable
from flexmask_cli.commands.bench import bench
from flexmask_cli.commands.check import check
from flexmask_cli.commands.compare import compare
from flexmask_cli.commands.doctor import doctor
from flexmask_cli.commands.eval import evaluate
from flexmask_cli.commands.generate import generate
from flexmask_cli.commands.kv_cache import kv_cache
from flexmask_cli.commands.merge import merge
from flexmask_cli.commands.new import new
from flexmask_cli.commands.plugins import plugins
from flexmask_cli.commands.precompute import precompute
from flexmask_cli.commands.score import score
from flexmask_cli.commands.show import show
from flexmask_cli.commands.strategies import strategies
from flexmask_cli.commands.tasks import tasks
from flexmask_cli.commands.warmup import warmup
from flexmask_cli.help_text import Command, Group
from flexmask_cli.option_kinds import flag
from flexmask_cli.option_names import OPTION_NAMES
from flexmask_cli.start_up import prepare_process
from flexmask_cli.streams import prepared_streams

_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])
"""click's, or its copy's that newer versions of typer bring and export no more of."""

COMMANDS = {
    "generate": generate,
    "score": score,
    "merge": merge,
    "eval": evaluate,
    "compare": compare,
    "bench": bench,
    "show": show,
    "strategies": strategies,
    "tasks": tasks,
    "plugins": plugins,
    "check": check,
    "new": new,
    "warmup": warmup,
    "precompute": precompute,
    "kv-cache": kv_cache,
    "doctor": doctor,
}


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"flexmask {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", "-V", callback=_print_version, is_eager=True, help="Print the version."
    ),
]
NoPlugins = Annotated[
    bool, flag("--no-plugins", help="Load the built-in strategies only, and no plugins.")
]


def _options(version: Version = False, no_plugins: NoPlugins = False) -> None:
    """Generate with structured attention; mask strategies are plugins."""
    if no_plugins:
        os.environ[LOAD_PLUGINS] = ""


def build_app() -> typer.Typer:
    """Return the command line with all commands."""
    app = typer.Typer(
        cls=Group,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    for name, command in COMMANDS.items():
        app.command(name, cls=Command)(command)
    return app


def main() -> None:
    """Run the command line.

    A `FlexMaskError` becomes one line and exit status 1; any other exception keeps its traceback.
    """
    prepare_process()
    try:
        with prepared_streams():
            _run()
    except FlexMaskError as error:
        message = " ".join(OPTION_NAMES.shown(str(error)).splitlines())
        sys.exit(f"error: {printable(message, WORDS)}")


def _run() -> NoReturn:
    try:
        OPTION_NAMES.app = build_app()
        status = OPTION_NAMES.app(prog_name="flexmask", standalone_mode=False)
    except _UsageError as error:
        said = io.StringIO()
        error.show(said)
        sys.stderr.write(printable(said.getvalue(), LINES))
        sys.exit(error.exit_code)
    sys.exit(status or 0)
