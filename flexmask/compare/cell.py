"""What a comparison is made of: strategies, fusions and numbers of segments, as cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexmask.errors import OptionError
from flexmask.fusion import Fusion
from flexmask.results.output_path import path_safe
from flexmask.strategy import Strategy

ATTENTION = Fusion("attention")
"""The fusion that a strategy itself is: all segments in one prompt, under its mask."""


@dataclass(frozen=True)
class Contender:
    """A strategy as it was asked for.

    Attributes:
        reference: Its registered name, or ``path/to/file.py:name``.
        strategy: The strategy.
    """

    reference: str
    strategy: Strategy

    @property
    def name(self) -> str:
        """Reference and parameters other than the defaults, as the command line takes them."""
        defaults = {item.name: item.default for item in self.strategy.parameters()}
        values = self.strategy.parameter_values().items()
        own = [f":{name}={value}" for name, value in values if value != defaults[name]]
        return self.reference + "".join(own)


@dataclass(frozen=True)
class Way:
    """One way to answer every request.

    Attributes:
        contender: Who sees whom within a prompt.
        fusion: How several segments become one answer.
        num_segments: How many segments of each request are used; None for all.
    """

    contender: Contender
    fusion: Fusion
    num_segments: int | None

    @property
    def name(self) -> str:
        """What is compared, without the number of segments."""
        if self.fusion == ATTENTION:
            return self.contender.name
        return f"{self.fusion} of {self.contender.name}"

    @property
    def segments(self) -> str:
        """The number of segments as text."""
        return "all" if self.num_segments is None else str(self.num_segments)


@dataclass(frozen=True)
class Cell:
    """A way that is run, and the others that would run the same.

    Attributes:
        way: What runs.
        name: Names it in tables; no strategy stands in it where the fusion is the same for all.
        same: The other ways, as text.
    """

    way: Way
    name: str
    same: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name and number of segments."""
        return f"{self.name} ({self.way.segments})"

    @property
    def stem(self) -> str:
        """Its files' name in the report folder, without extension."""
        return path_safe(f"{self.name}-{self.way.segments}")


def plan_ways(
    contenders: Sequence[Contender],
    fusions: Sequence[Fusion],
    segment_counts: Sequence[int | None],
) -> list[Way]:
    """All that is to be compared, in the order of the table.

    Every strategy is there with the fusion that it is. The other fusions run each segment as a
    prompt of its own.

    Args:
        contenders: The strategies.
        fusions: The other fusions; `ATTENTION` may be among them.
        segment_counts: How many segments of each request; None for all.

    Raises:
        OptionError: If there is nothing to compare, or something stands twice.
    """
    for what, names in (
        ("strategy", [contender.name for contender in contenders]),
        ("fusion", list(map(str, fusions))),
        ("number of segments", list(map(str, segment_counts))),
    ):
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise OptionError(f"{what} {repeated} is given twice")
    if not contenders:
        raise OptionError("a comparison needs at least one strategy")
    others = [fusion for fusion in fusions if fusion != ATTENTION]
    return [
        Way(contender, fusion, count)
        for count in segment_counts
        for fusion in (ATTENTION, *others)
        for contender in contenders
    ]
