"""Options that spread a run over processes, GPUs and machines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from flexmask.errors import OptionError
from flexmask_cli.option_kinds import size, text

if TYPE_CHECKING:  # Arrow and Jinja are slow to import
    from flexmask.tasks.request_source import RequestSource
    from flexmask.tasks.shards import Shard


class RunEngine(StrEnum):
    """Values of ``--engine``."""

    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True)
class ScalingOptions:
    """The part of the input that is run, and the processes that run it."""

    heading: ClassVar[str] = "Scaling"

    shard: Annotated[
        str | None,
        text(
            "--shard",
            metavar="I/N",
            help="Run part I of N of the input's rows, for job arrays; 'flexmask merge' joins "
            "the parts.",
        ),
    ] = None
    engine: Annotated[
        RunEngine,
        typer.Option(
            metavar="local|ray",
            help="local runs in this process. ray runs on all GPUs, or CPUs, of a Ray cluster, "
            "or of this machine; input and output must be on a folder that its machines share.",
        ),
    ] = RunEngine.LOCAL
    workers: Annotated[
        int | None,
        size(
            "--workers",
            help="Workers of --engine ray, each with a GPU, or a CPU where there is none. "
            "Default: as many as the cluster has.",
        ),
    ] = None
    address: Annotated[
        str | None,
        text(
            "--address",
            metavar="ADDRESS",
            help="Address of a Ray cluster; auto is the one that this machine belongs to. "
            "Default: the variable RAY_ADDRESS; if it is not set, a cluster of this machine.",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionError: If an option has a value that it cannot have, or needs another one.
        """
        if self.chosen_shard is not None and self.is_on_ray:
            raise OptionError("--engine ray makes shards of its own; leave out --shard")
        for name in ("workers", "address"):
            if getattr(self, name) is not None and not self.is_on_ray:
                raise OptionError(f"--{name} needs --engine ray")

    @property
    def is_on_ray(self) -> bool:
        """True if the run is carried out by Ray."""
        return self.engine is RunEngine.RAY

    @property
    def chosen_shard(self) -> Shard | None:
        """The shard to run; None for the whole input."""
        from flexmask.tasks.shards import Shard

        return None if self.shard is None else Shard.parse(self.shard)

    def rows_of(self, requests: RequestSource) -> RequestSource:
        """Return the requests of the rows to run; for a shard the input is read once.

        Raises:
            RequestError: If the input of a shard cannot be read, or lacks rows or columns.
        """
        from flexmask.tasks.input_survey import survey

        if self.chosen_shard is None:
            return requests
        return replace(requests, part=survey(requests).part(self.chosen_shard))
