"""``flexmask doctor``: whether everything that flexmask needs works here."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from flexmask_cli import render


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try what flexmask needs here: packages, compiler, GPU, attention, caches, plugins."""
    from flexmask.doctor import run_checks

    checks = []
    for check in run_checks():
        checks.append(check)
        if not as_json:
            render.print_check(check)
    if as_json:
        render.print_json([dataclasses.asdict(check) for check in checks])
    if any(check.state == "broken" for check in checks):
        raise typer.Exit(1)
