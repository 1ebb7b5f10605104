"""``flexmask doctor``: whether everything that flexmask needs works here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from flexmask_cli import render
from flexmask_cli.options import Device, Dtype, TrustRemoteCode

if TYPE_CHECKING:
    from flexmask.doctor import Check

CheckedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Check this model instead: whether model.generate under flexmask and the engine give "
        "what transformers' own attention gives.",
    ),
]


def doctor(
    model: CheckedModel = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try what flexmask needs here: packages, compiler, GPU, attention, caches, plugins.

    With --model, compare a model's logits and greedy tokens under flexmask with those under
    transformers' own attention, on a short batch.
    """
    checks = []
    for check in _checks(model, device, dtype, trust_remote_code):
        checks.append(check)
        if not as_json:
            render.print_check(check)
    if as_json:
        render.print_json([dataclasses.asdict(check) for check in checks])
    if any(check.state == "broken" for check in checks):
        raise typer.Exit(1)


def _checks(
    model: str | None, device: str, dtype: str, trust_remote_code: bool
) -> Iterable[Check]:
    from flexmask.doctor import run_checks

    if model is None:
        return run_checks()
    from transformers.utils import logging

    from flexmask.doctor.model_checks import load_and_check

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load_and_check(model, device, dtype, trust_remote_code=trust_remote_code)
