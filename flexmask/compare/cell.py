"""The cells of a comparison: combinations of strategy, fusion and number of segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexmask.errors import OptionError
from flexmask.fusion import Fusion
from flexmask.results.output_path import path_safe
from flexmask.strategy import Strategy

ATTENTION = Fusion("attention")
"""The fusion done by a strategy's mask itself: all segments in one prompt."""


@dataclass(frozen=True)
class Contender:
    """A strategy to compare, as the user named it.

    Attributes:
        reference: Its registered name, or ``path/to/file.py:name``.
        strategy: The strategy.
    """

    reference: str
    strategy: Strategy

    @property
    def name(self) -> str:
        """Reference and non-default parameters, in the syntax of the command line."""
        defaults = {item.name: item.default for item in self.strategy.parameters()}
        values = self.strategy.parameter_values().items()
        own = [f":{name}={value}" for name, value in values if value != defaults[name]]
        return self.reference + "".join(own)


@dataclass(frozen=True)
class Way:
    """One way to answer every request.

    Attributes:
        contender: The strategy within a prompt.
        fusion: The fusion of several segments into one answer.
        num_segments: Number of segments used of each request; None for all.
    """

    contender: Contender
    fusion: Fusion
    num_segments: int | None

    @property
    def name(self) -> str:
        """Names of fusion and strategy, without the number of segments."""
        if self.fusion == ATTENTION:
            return self.contender.name
        return f"{self.fusion} of {self.contender.name}"

    @property
    def segments(self) -> str:
        """Number of segments as text."""
        return "all" if self.num_segments is None else str(self.num_segments)


@dataclass(frozen=True)
class Cell:
    """A way to run, with the other ways that would run the same prompts.

    Attributes:
        way: The way to run.
        name: Its name in tables; without a strategy if all strategies give the same prompts.
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
        """Name of its files in the report folder, without extension."""
        return path_safe(f"{self.name}-{self.way.segments}")


def plan_ways(
    contenders: Sequence[Contender],
    fusions: Sequence[Fusion],
    segment_counts: Sequence[int | None],
) -> list[Way]:
    """Return all ways to compare, in the order of the table.

    Every strategy is listed with `ATTENTION`. The other fusions run each segment as a prompt of
    its own.

    Args:
        contenders: The strategies.
        fusions: The fusions; `ATTENTION` may be among them.
        segment_counts: Numbers of segments of each request; None for all.

    Raises:
        OptionError: If there is no strategy, or something is given twice.
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
