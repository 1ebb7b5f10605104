"""Scales the log-sum-exp of a part of the keys (`flexmask.strategy.ScaledPart`).

FlexAttention changes scores one by one, but this change needs a sum over the part, which
FlexAttention compiled for a CPU does not return (torch 2.13). So the sum is measured by attention:
it attends to the part and to the query's own key, with values that are 1 in the first column for
the part and in the second for the own key. The result holds the shares ``p`` and ``o`` of the
attention weights, and with the own key's score ``s`` the log-sum-exp is ``s + log(p / o)``. Both
shares must be within the range of a float, so ``s`` should be near the sum. A first pass, with
all scores divided by `COARSE`, finds such an ``s``, and a second pass measures with it. The third
pass, the actual attention, adds ``(scale - 1)`` times the log-sum-exp to the scores of the part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from flexmask.attention.placement import Placement
    from flexmask.mod_types import ScoreMod
    from flexmask.strategy import ScaledPart

COARSE = 6.0
"""Finds sums that differ by up to 520 from the own score, and those of up to a million keys."""

MIN_VALUE_DIM = 16
"""Triton multiplies no matrices with fewer columns."""


@dataclass(frozen=True)
class PlacedPart:
    """A scaled part, and the places of queries and keys.

    Attributes:
        part: The part, a function of slots.
        placement: Translates the indices of queries and keys.
    """

    part: ScaledPart
    placement: Placement

    def holds(self, b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Return True for pairs whose key is in the part and whose query it is scaled for."""
        of_query = self.part.queries(*self.placement.query(b, q_idx))
        return of_query & self.holds_key(b, kv_idx)

    def holds_key(self, b: Tensor, kv_idx: Tensor) -> Tensor:
        """Return True for keys in the part."""
        return self.part.keys(*self.placement.key(b, kv_idx))

    def is_own(self, b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Return True for pairs of a query with its own key."""
        row, slot = self.placement.query(b, q_idx)
        key_row, key_slot = self.placement.key(b, kv_idx)
        return (slot == key_slot) & (row == key_row)


def place_part(part: ScaledPart | None, placement: Placement) -> PlacedPart | None:
    """Combine a part with the places of queries and keys; None if it changes nothing."""
    return None if part is None or part.scale == 1 else PlacedPart(part, placement)


def scaled_score_mod(
    placed: PlacedPart,
    score_mod: ScoreMod | None,
    query: Tensor,
    key: Tensor,
    own_key: Tensor,
    scaling: float | None,
    attend: Callable[[Tensor, ScoreMod], Tensor],
) -> ScoreMod:
    """Measure the part, and return the score_mod that scales it.

    Args:
        placed: The part and the places of queries and keys.
        score_mod: A change of scores that applies first.
        query: ``(B, H, Q, D)``.
        key: ``(B, H_kv, K, D)``.
        own_key: ``(B, H_kv, Q, D)``, the key of each query's own token.
        scaling: Factor on the scores; None for ``D ** -0.5``.
        attend: Attention to values ``(B, H_kv, K, D_v)`` under a score_mod.
    """

    def changed(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score if score_mod is None else score_mod(score, b, h, q_idx, kv_idx)

    def in_part(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score = changed(score, b, h, q_idx, kv_idx)
        return torch.where(placed.holds(b, q_idx, kv_idx), score, -float("inf"))

    def coarse(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        part = in_part(score, b, h, q_idx, kv_idx)
        return torch.where(placed.is_own(b, q_idx, kv_idx), score, part) / COARSE

    def exact(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        part = in_part(score, b, h, q_idx, kv_idx)
        return torch.where(placed.is_own(b, q_idx, kv_idx), near[b, h, q_idx], part)

    log_sum_exp, size = torch.ops.flexmask.part_log_sum_exp, placed.placement.shape
    values, own_score = _which(placed, key), _own_scores(query, own_key, scaling)
    near = log_sum_exp(attend(values, coarse), own_score, COARSE, *size)
    sums = log_sum_exp(attend(values, exact), near, 1.0, *size)
    factor = placed.part.scale - 1.0

    def scaled(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score = changed(score, b, h, q_idx, kv_idx)
        return torch.where(
            placed.holds(b, q_idx, kv_idx), score + factor * sums[b, h, q_idx], score
        )

    return scaled


def _which(placed: PlacedPart, key: Tensor) -> Tensor:
    """Return values with 1 in the first column for keys of the part, in the second for others."""
    rows, keys = (torch.arange(key.shape[dim], device=key.device) for dim in (0, 2))
    is_part = placed.holds_key(rows[:, None], keys).expand(len(rows), len(keys))
    columns = torch.stack((is_part, ~is_part), -1).to(key.dtype)
    columns = nn.functional.pad(columns, (0, MIN_VALUE_DIM - 2))
    return columns[:, None].expand(-1, key.shape[1], -1, -1).contiguous()


def _own_scores(query: Tensor, own_key: Tensor, scaling: float | None) -> Tensor:
    """Return the score of each query with its own key, ``(B, H, Q)`` in float32."""
    keys = own_key.repeat_interleave(query.shape[1] // own_key.shape[1], 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return (query.float() * keys.float()).sum(-1) * scale


# A separate operator, because flex's CPU kernel cannot capture a tensor that inductor computes:
# its strides are not fixed yet (torch 2.13).
@torch.library.custom_op("flexmask::part_log_sum_exp", mutates_args=())
def part_log_sum_exp(
    shares: Tensor, own_score: Tensor, divisor: float, rows: int, queries: int
) -> Tensor:
    """Compute the log-sum-exp of a part, in a tensor whose size is independent of the batch.

    Args:
        shares: ``(B, H, Q, 2 or more)`` attention weight of the part, and of the own key.
        own_score: ``(B or more, H, Q or more)`` score of the query's own key, before division.
        divisor: The number by which scores were divided; the result is exact only for 1.
        rows: Rows of the result, at least ``B``.
        queries: Queries of the result, at least ``Q``.

    Returns:
        ``(rows, H, queries)`` float32.
    """
    batch_size, heads, length, _ = shares.shape
    part, own = shares[..., :2].float().clamp_min(torch.finfo(torch.float32).tiny).unbind(-1)
    sums = own_score.new_zeros(rows, heads, queries)
    own_score = own_score[:batch_size, :, :length]
    sums[:batch_size, :, :length] = own_score + divisor * (part.log() - own.log())
    return sums


@part_log_sum_exp.register_fake
def _(shares: Tensor, own_score: Tensor, divisor: float, rows: int, queries: int) -> Tensor:
    return own_score.new_empty(rows, shares.shape[1], queries)
