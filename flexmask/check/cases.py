"""The requests on which strategies are checked, smallest first."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, islice

from flexmask.layout import TokenizedRequest


@dataclass(frozen=True)
class Case:
    """The lengths of a request's parts, in tokens."""

    prefix: int
    segments: tuple[int, ...]
    tail: int

    def __str__(self) -> str:
        """Return the lengths as text, such as ``prefix 2, segments 3 + 2, tail 1``."""
        segments = " + ".join(map(str, self.segments))
        return f"prefix {self.prefix}, segments {segments}, tail {self.tail}"

    def request(self) -> TokenizedRequest:
        """Return a request of these lengths in which all tokens differ."""
        tokens = count(1)

        def take(length: int) -> tuple[int, ...]:
            return tuple(islice(tokens, length))

        return TokenizedRequest(
            take(self.prefix), tuple(take(length) for length in self.segments), take(self.tail)
        )

    def rearranged(self) -> Case:
        """Return a case with other boundaries between the segments.

        The number of segments and of all their tokens is the same, and so is the layout's length.
        """
        first, *others = self.segments
        if not others or others[-1] == 1:
            return Case(self.prefix, self.segments[::-1], self.tail)
        return Case(self.prefix, (first + 1, *others[:-1], others[-1] - 1), self.tail)


SMALL = (
    Case(prefix=1, segments=(2,), tail=1),
    Case(prefix=0, segments=(2, 3), tail=1),
    Case(prefix=2, segments=(3, 2), tail=2),
    Case(prefix=3, segments=(1, 4, 2, 6, 3), tail=2),
)

TILE_EDGES = tuple(Case(prefix=prefix, segments=(50, 47), tail=3) for prefix in (27, 28, 29))
"""127, 128 and 129 tokens: one fewer than a tile, a tile, one more."""

LONG = Case(prefix=90, segments=(310, 260, 330), tail=30)

CASES = (*SMALL, *TILE_EDGES, LONG)

SAME_SHAPE = tuple(
    Case(prefix=4, segments=segments, tail=2) for segments in ((3, 6, 5), (6, 5, 3), (5, 3, 6))
)
"""Layouts of one length and number of segments that have different masks."""
