"""``flexmask strategies``: what can be asked for."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from flexmask.registry import RegisteredStrategy, load_registry
from flexmask.strategy import Parameter
from flexmask_cli import render


def strategies(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List mask strategies, their parameters and who provides them."""
    registry = load_registry()
    render.print_warnings(registry.problems())
    registered = registry.strategies()
    if as_json:
        render.print_json([_fields(item) for item in registered])
    else:
        render.print_table([_row(item) for item in registered], wrapped=["parameters", "rule"])


def _fields(item: RegisteredStrategy) -> dict[str, Any]:
    return {
        "name": item.cls.name,
        "summary": item.cls.summary(),
        "distribution": item.owner.distribution,
        "version": item.owner.version,
        "entry_point": item.owner.entry_point,
        "parameters": [dataclasses.asdict(parameter) for parameter in item.cls.parameters()],
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
        default = default.lower()  # as --param takes it
    return f"{parameter.name}: {parameter.type} = {default}"
