"""The prefix cache: keys and values of tokens that prompts begin with, computed once and copied.

Keys and values of a token depend on the token, its position and all that it sees. Where the same
tokens have the same positions and see only themselves, causally, their keys and values are equal:
in every prompt, and in every copy of a prefix within one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexmask.kv_store.span_values import LayerGroupValues
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
    values: tuple[LayerGroupValues, ...]

    def starts_in(self, layout: Layout) -> list[int]:
        """Find the slots of a prompt at which these tokens begin, each time at position 0.

        The last prompt token is left out, because decoding computes it.
        """
        return _starts_of(self.token_ids, layout)


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
            length = common_length(layout.token_ids[:length], first.token_ids[:length])
    positions = first.position_ids[:length]
    length = common_length(positions, tuple(range(length)))
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
        for start in np.flatnonzero(layout.position_array[: len(layout) - length] == 0).tolist()
        if layout.token_ids[start : start + length] == token_ids
        and layout.position_ids[start : start + length] == positions
    ]


def common_length(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Return how many first numbers two tuples have in common."""
    equal, stop = 0, min(len(first), len(second))
    if first[:stop] == second[:stop]:
        return stop
    # By halves: slices are compared in C, many times as fast as a loop over numbers.
    while stop - equal > 1:
        middle = (equal + stop) // 2
        if first[equal:middle] == second[equal:middle]:
            equal = middle
        else:
            stop = middle
    return equal
