"""Bounds the values of a mask in whole regions of pairs, by intervals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexmask.block_mask.intervals.evaluator import MaskEvaluator
from flexmask.block_mask.intervals.interval import Interval, exact_index
from flexmask.block_mask.intervals.stand_in import NoIntervalRule
from flexmask.mod_types import MaskMod


class Regions(NamedTuple):
    """Rectangles of (query, key) pairs, or the parts of them on one side of a diagonal.

    All tensors are ``(N,)`` int64 on the CPU.

    Example:
        The pairs of slots 4 to 7 in which a query sees itself or an earlier key: queries and keys
        from 4 to 7, with differences ``q_idx - kv_idx`` from 0 to 3.

    Attributes:
        rows: Batch row of each.
        first_queries: First slot of the queries.
        last_queries: Their last slot.
        first_keys: First slot of the keys.
        last_keys: Their last slot.
        least: Least difference of the slots of a query and a key.
        most: Largest one.
    """

    rows: Tensor
    first_queries: Tensor
    last_queries: Tensor
    first_keys: Tensor
    last_keys: Tensor
    least: Tensor
    most: Tensor

    @classmethod
    def rectangles(cls, rows: Tensor, queries: Tensor, keys: Tensor) -> Regions:
        """Make rectangles of ``queries`` and ``keys``, ``(N, 2)`` first and last slots."""
        (q_first, q_last), (k_first, k_last) = queries.unbind(1), keys.unbind(1)
        return cls(rows, q_first, q_last, k_first, k_last, q_first - k_last, q_last - k_first)

    @classmethod
    def below_diagonal(cls, rows: Tensor, slots: Tensor) -> Regions:
        """Make the pairs of slots in which the key is not after the query; ``slots`` as above."""
        first, last = slots.unbind(1)
        return cls(rows, first, last, first, last, torch.zeros_like(first), last - first)

    @classmethod
    def above_diagonal(cls, rows: Tensor, slots: Tensor) -> Regions:
        """Make the pairs of slots in which the key is after the query, of two slots or more."""
        first, last = slots.unbind(1)
        return cls(rows, first, last, first, last, first - last, -torch.ones_like(first))


def joined(*regions: Regions) -> Regions:
    """Join regions, so that one evaluation bounds all of them."""
    return Regions(*map(torch.cat, zip(*regions, strict=True)))


def region_values(mask_mod: MaskMod, regions: Regions) -> Tensor:
    """Bound the values of a mask in regions, without evaluating a pair.

    Args:
        mask_mod: A mask that does not depend on the head, and captures tensors on the CPU.
        regions: The regions, at least one.

    Returns:
        ``(2, N)`` bool: whether the mask is certainly true in all pairs, and whether it may be
        true in some. A region in which neither is known counts as not certain and possible.

    Raises:
        MaskError: If the mask_mod breaks a rule of FlexAttention.
    """
    evaluator = MaskEvaluator(mask_mod, regions.rows.device, pointwise_only=True)

    def interval(first: Tensor, last: Tensor) -> Interval:
        bounds = (int(first.min()), int(last.max()))
        return Interval(torch.stack((first, last)), evaluator, bounds=bounds)

    count = len(regions.rows)
    try:
        ends = evaluator.interval_ends(
            exact_index(regions.rows, int(regions.rows.max()) + 1, evaluator),
            exact_index(torch.zeros_like(regions.rows), 1, evaluator),
            interval(regions.first_queries, regions.last_queries),
            interval(regions.first_keys, regions.last_keys),
            interval(regions.least, regions.most),
        )
    except NoIntervalRule:
        return torch.tensor([[False], [True]]).expand(2, count)
    return ends.expand(2, count)
