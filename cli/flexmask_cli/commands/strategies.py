"""``flexmask strategies``: lists the installed mask strategies."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from flexmask.plugins.registry import RegisteredStrategy
from flexmask.strategy import Parameter, Strategy
from flexmask_cli import completion
from flexmask_cli.option_groups import takes_options
from flexmask_cli.options import ListingOptions
from flexmask_cli.render.lines import print_json, print_line
from flexmask_cli.render.table import print_table
from flexmask_cli.strategy_choice import load_plugins, stdout_to_stderr

SHOWN_LENGTHS = 3, (4, 3, 5), 2
"""Tokens of prefix, segments and tail of the layout whose mask is drawn."""
WIDTH = 80


@dataclass(frozen=True)
class StrategiesOptions(ListingOptions):
    """A listing of all strategies, or one strategy."""

    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Show this strategy, with its mask.",
            autocompletion=completion.strategies,
        ),
    ] = None


@takes_options
def strategies(*, options: StrategiesOptions) -> None:
    """List mask strategies, their parameters and the packages they come from; or show one."""
    registry = load_plugins()
    if options.name is not None:
        _show_one(registry.registered(options.name), options.as_json)
        return
    registered = registry.strategies()
    if options.as_json:
        print_json([_fields(item) for item in registered])
    else:
        print_table([_row(item) for item in registered], wrapped=["parameters", "rule"])


def _show_one(item: RegisteredStrategy, as_json: bool) -> None:
    with stdout_to_stderr():
        picture = _picture(item.cls())
    if as_json:
        source = {"source": item.cls.source(), "picture": picture.splitlines()}
        print_json(_fields(item) | source)
        return
    owner = item.owner
    rows = {
        item.cls.name: item.cls.summary(),
        "from": f"{owner.distribution} {owner.version}, entry point {owner.entry_point}",
        "source": item.cls.source(),
    }
    for parameter in item.cls.parameters():
        declared = _parameter(parameter).removeprefix(f"{parameter.name}: ")
        rows[f"--param {parameter.name}"] = f"{declared}  {parameter.help}"
    width = max(map(len, rows))
    for name, text in rows.items():
        print_line(f"{name:{width}}  {text}")
    print_line(f"\n{picture}")


def _picture(strategy: Strategy) -> str:
    """Return the mask of a small layout as text."""
    from flexmask.show.mask_picture import draw_mask
    from flexmask.show.picture_source import subject_of_lengths
    from flexmask.show.terminal import ascii_picture

    try:
        picture = draw_mask(strategy, subject_of_lengths(*SHOWN_LENGTHS).shown)
        return ascii_picture(picture, WIDTH)
    except Exception as error:  # raised by the plugin; everything else is shown
        described = str(error) or type(error).__name__
        return f"no picture: {described}; 'flexmask check {strategy.name}' says more"


def _fields(item: RegisteredStrategy) -> dict[str, Any]:
    return {
        "name": item.cls.name,
        "summary": item.cls.summary(),
        "distribution": item.owner.distribution,
        "version": item.owner.version,
        "entry_point": item.owner.entry_point,
        "parameters": [asdict(parameter) for parameter in item.cls.parameters()],
    }


def _row(item: RegisteredStrategy) -> dict[str, str]:
    return {
        "strategy": item.cls.name,
        "from": f"{item.owner.distribution} {item.owner.version}",
        "parameters": ", ".join(map(_parameter, item.cls.parameters())),
        "rule": item.cls.summary(),
    }


def _parameter(parameter: Parameter) -> str:
    default = str(parameter.default)
    if isinstance(parameter.default, bool):
        default = default.lower()  # as in --param
    return f"{parameter.name}: {parameter.type} = {default}"
