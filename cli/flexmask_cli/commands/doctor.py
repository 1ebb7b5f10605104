"""``flexmask doctor``: whether everything that flexmask needs works here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from flexmask_cli import render
from flexmask_cli.engine_loading import quiet_transformers
from flexmask_cli.option_groups import takes_options
from flexmask_cli.option_kinds import text
from flexmask_cli.options import AsJson, DeviceOptions, TrustRemoteCode

if TYPE_CHECKING:
    from flexmask.doctor import Check


@dataclass(frozen=True)
class DoctorOptions:
    """What is checked."""

    heading: ClassVar[str] = "Model"

    model: Annotated[
        str | None,
        text(
            "--model",
            metavar="MODEL",
            help="Check this model instead of the machine: a hub id, folder or .gguf file.",
        ),
    ] = None
    trust_remote_code: TrustRemoteCode = False
    as_json: AsJson = False


@takes_options
def doctor(
    *, options: DoctorOptions, device: DeviceOptions = DeviceOptions(dtype="float32")
) -> None:
    """Check that everything flexmask needs works on this machine.

    That is packages, the compiler, the GPU, attention, caches and plugins. With --model, compare
    the logits and greedy tokens of a model under flexmask, by model.generate and by the engine,
    with those under transformers' own attention, on a short batch.
    """
    checks = []
    for check in _checks(options, device):
        checks.append(check)
        if not options.as_json:
            render.print_check(check)
    if options.as_json:
        render.print_json([asdict(check) for check in checks])
    if any(check.state == "broken" for check in checks):
        raise typer.Exit(1)


def _checks(options: DoctorOptions, device: DeviceOptions) -> Iterable[Check]:
    from flexmask.doctor import run_checks

    if options.model is None:
        return run_checks()
    from flexmask.doctor.model_checks import load_and_check

    quiet_transformers()
    return load_and_check(
        options.model,
        device.device,
        device.dtype,
        trust_remote_code=options.trust_remote_code,
    )
