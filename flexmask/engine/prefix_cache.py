"""The prefix cache: keys and values of tokens that prompts begin with, computed once and copied.

Keys and values of a token depend on the token, its position and all that it sees. Where the same
tokens have the same positions and see only themselves, causally, their keys and values are equal:
in every prompt, and in every copy of a prefix within one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from flexmask.engine.kv_cache import LayerValues
from flexmask.layout import Layout

MIN_PREFIX_TOKENS = 16
"""A shorter common prefix is not worth the copying."""


@dataclass(frozen=True)
class CachedPrefix:
    """Tokens at positions from 0 on, with their keys and values; the model runner makes it.

    Attributes:
        token_ids: The ``P`` tokens.
        values: Their keys and values in all layers.
    """

    token_ids: tuple[int, ...]
    values: tuple[LayerValues, ...]

    def starts_in(self, layout: Layout) -> list[int]:
        """Find the slots of a prompt at which these tokens begin, each time at position 0.

        The last prompt token is left out, because decoding computes it.
        """
        return _starts_of(self.token_ids, layout)


@dataclass(frozen=True)
class SharedBeginning:
    """Tokens that the prompt at one index of a list begins with like an other one.

    Attributes:
        row: Index of the prompt.
        donor: Index of the other one.
        length: Number of tokens.
    """

    row: int
    donor: int
    length: int


def shared_beginnings(
    layouts: Sequence[Layout], counts: Sequence[int], least: int = MIN_PREFIX_TOKENS
) -> list[SharedBeginning]:
    """Find for each prompt the longest beginning that another one has too.

    Sorted by their tokens, a prompt shares most with its neighbours, as in a tree of prefixes.

    Args:
        layouts: The prompts.
        counts: Tokens of each that may be shared.
        least: Fewest tokens that are worth sharing.

    Returns:
        At most one for each prompt, at positions 0, 1 and so on; the donor of one comes before it
        or has none itself.
    """
    order = sorted(range(len(layouts)), key=lambda index: layouts[index].token_ids)
    first_positions = tuple(range(least))
    shared = []
    for donor, row in pairwise(order):
        ours, theirs = layouts[row], layouts[donor]
        length = min(counts[donor], counts[row])
        if length < least or ours.token_ids[:least] != theirs.token_ids[:least]:
            continue  # most prompts, and comparing these few tokens is fast
        if ours.position_ids[:least] != first_positions:
            continue
        for values in ("token_ids", "position_ids"):
            mine, others = (getattr(layout, values)[:length] for layout in (ours, theirs))
            length = _common_length(mine, others)
        length = _common_length(ours.position_ids[:length], tuple(range(length)))
        if length >= least:
            shared.append(SharedBeginning(row, donor, length))
    return shared


def common_prefix_length(layouts: Sequence[Layout]) -> int:
    """Number of first tokens that all prompts have in common, at positions 0, 1 and so on.

    The last token of a prompt is not counted.

    Returns:
        0 if the common prefix is too short to be worth the copying.
    """
    first = layouts[0]
    length = min(map(len, layouts)) - 1
    for layout in layouts:
        if layout.token_ids[:length] != first.token_ids[:length]:
            length = _common_length(layout.token_ids[:length], first.token_ids[:length])
    positions = first.position_ids[:length]
    length = _common_length(positions, tuple(range(length)))
    return length if length >= MIN_PREFIX_TOKENS else 0


def pays_off(layouts: Sequence[Layout], length: int, batch_size: int) -> bool:
    """Return whether the first ``length`` tokens occur often enough for copying to save time.

    Computing them once takes as long as a batch of prompts of that length.
    """
    token_ids = layouts[0].token_ids[:length]
    copies = 0
    for layout in layouts:
        copies += len(_starts_of(token_ids, layout))
        if copies >= 2 * batch_size:
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
    """Indices of zeros, by `tuple.index`, which is ten times as fast as a loop."""
    start = 0
    for _ in range(values.count(0)):
        start = values.index(0, start) + 1
        yield start - 1


def _common_length(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    if first == second:
        return len(first)
    differs = (one != other for one, other in zip(first, second, strict=True))
    return next(index for index, differ in enumerate(differs) if differ)
