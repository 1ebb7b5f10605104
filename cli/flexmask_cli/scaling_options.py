"""Options that spread a run over processes, GPUs and machines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from flexmask_cli.option_kinds import text

if TYPE_CHECKING:  # Arrow and Jinja are slow to import
    from flexmask.tasks.request_source import RequestSource
    from flexmask.tasks.shards import Shard


@dataclass(frozen=True)
class ScalingOptions:
    """The part of the input that this process runs."""

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

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionError: If an option has a value that it cannot have.
        """
        _ = self.chosen_shard

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
