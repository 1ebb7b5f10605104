"""``flexmask doctor``: checks that everything flexmask needs works on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from flexmask.errors import OptionError
from flexmask_cli.engine_loading import quiet_transformers
from flexmask_cli.option_groups import takes_options
from flexmask_cli.options import DeviceOptions, ListingOptions, RunModelOptions
from flexmask_cli.render.lines import print_json, print_line

if TYPE_CHECKING:
    from flexmask.doctor import Check


DEFAULT_DEVICE = DeviceOptions(dtype="float32")
NAME_COLUMNS = 26
"""Width of the column of names."""


@takes_options
def doctor(
    *,
    model: RunModelOptions,
    device: DeviceOptions = DEFAULT_DEVICE,
    listing: ListingOptions,
) -> None:
    """Check that everything flexmask needs works on this machine.

    It checks packages, the compiler, the GPU, attention, caches and plugins. With --model it
    checks that model instead: on a short batch, it compares logits and greedy tokens under
    flexmask, from model.generate and from the engine, with those under transformers' own
    attention.
    """
    if model.model is None and (model != RunModelOptions() or device != DEFAULT_DEVICE):
        raise OptionError(
            "--device, --dtype, --adapter, --quantize and --trust-remote-code need a --model to "
            "check"
        )
    checks = []
    for check in _checks(model, device):
        checks.append(check)
        if not listing.as_json:
            _print_check(check)
    if listing.as_json:
        print_json([asdict(check) for check in checks])
    if any(check.state == "broken" for check in checks):
        raise typer.Exit(1)


def _print_check(check: Check) -> None:
    """Print the outcome of a check in one line, with advice."""
    state = {"ok": "ok", "warning": "warn", "unavailable": "-", "broken": "BROKEN"}[check.state]
    advice = f"; {check.advice}" if check.advice else ""
    print_line(f"{state:6}  {check.name:<{NAME_COLUMNS}}  {check.detail}{advice}")


def _checks(model: RunModelOptions, device: DeviceOptions) -> Iterable[Check]:
    from flexmask.doctor import run_checks

    if model.model is None:
        return run_checks()
    from flexmask.doctor.model_checks import load_and_check

    quiet_transformers()
    return load_and_check(
        model.model,
        device.device,
        device.dtype,
        trust_remote_code=model.trust_remote_code,
        **model.changes,
    )
