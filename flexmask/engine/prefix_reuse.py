"""A beginning that prompts share: where it stands in each, so that it is computed once.

Keys and values of a token depend on what it sees, its position and the tokens before it. Where
the same tokens stand at the same positions and see only themselves, causally, they are the same,
in every prompt and in every copy of a prefix within one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from flexmask.layout import Layout

MIN_SHARED_TOKENS = 16
"""A shorter beginning is not worth the copying."""


@dataclass(frozen=True)
class SharedPrefix:
    """Tokens at positions from 0 on, and their keys and values.

    Attributes:
        token_ids: The ``P`` tokens.
        cache: Keys and values of each layer, ``(H_kv, P, D)`` each.
    """

    token_ids: tuple[int, ...]
    cache: tuple[tuple[Tensor, Tensor], ...]

    def starts_in(self, layout: Layout) -> list[int]:
        """Slots of a prompt at which these tokens begin, each at position 0.

        The last prompt token is left out: decoding begins with it.
        """
        return _starts_of(self.token_ids, layout)


def shared_beginning(layouts: Sequence[Layout]) -> int:
    """Number of first tokens that all prompts have in common, at positions 0, 1 and so on.

    The last token of a prompt is not counted, nor a beginning too short to be worth it.
    """
    first = layouts[0]
    length = min(map(len, layouts)) - 1
    for layout in layouts:
        if layout.token_ids[:length] != first.token_ids[:length]:
            length = _common_length(layout.token_ids[:length], first.token_ids[:length])
    positions = first.position_ids[:length]
    length = _common_length(positions, tuple(range(length)))
    return length if length >= MIN_SHARED_TOKENS else 0


def pays_off(layouts: Sequence[Layout], length: int, batch_size: int) -> bool:
    """Whether the first ``length`` tokens stand in so many places that copying saves work.

    Computing them once takes the time of a batch of that length.
    """
    token_ids = layouts[0].token_ids[:length]
    places = 0
    for layout in layouts:
        places += len(_starts_of(token_ids, layout))
        if places >= 2 * batch_size:
            return True
    return False


def _starts_of(token_ids: tuple[int, ...], layout: Layout) -> list[int]:
    length = len(token_ids)
    positions = tuple(range(length))
    return [
        start
        for start in _zeros(layout.position_ids[: len(layout) - length])
        if layout.token_ids[start : start + length] == token_ids
        and layout.position_ids[start : start + length] == positions
    ]


def _zeros(values: tuple[int, ...]) -> Iterator[int]:
    """Where a zero stands; `tuple.index` looks for it ten times as fast as a loop."""
    start = 0
    for _ in range(values.count(0)):
        start = values.index(0, start) + 1
        yield start - 1


def _common_length(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        if one != other:
            return index
    return len(first)
