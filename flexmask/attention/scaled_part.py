"""A part of the keys whose log-sum-exp is scaled (`flexmask.strategy.ScaledPart`).

FlexAttention changes scores one by one, and this change needs the sum over the part, which
FlexAttention compiled for CPU does not return (torch 2.13). So it is measured: attention to the
part and to the query's own key, with values that say which of the two a key is, gives the shares
that both have of the weights, and the own key's score times their ratio is the sum. A share has to
be within the range of a float, so the score that the own key is given should be near the sum: a
first pass, with all scores divided by `COARSE`, finds one that is; a second measures exactly. The
attention that counts then adds ``(scale - 1)`` times the log-sum-exp to the scores of the part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flexmask.torch_internals import mark_static

if TYPE_CHECKING:
    from flexmask.mod_types import ScoreMod
    from flexmask.strategy import ScaledPart

COARSE = 6.0
"""Sums up to 520 from the own score are found, and near those of a million keys."""

MIN_VALUE_DIM = 16
"""Triton multiplies no narrower matrices."""


@dataclass(frozen=True)
class PlacedPart:
    """A part, for queries that stand at some slots of their rows.

    Attributes:
        part: What is scaled; it speaks of slots.
        slots: ``(B, Q)`` slot of each query, for as many rows and queries as there ever are.
    """

    part: ScaledPart
    slots: Tensor

    def holds(self, b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Whether the score of a pair is in the part, and the query one that it is scaled for."""
        return self.part.queries(b, self.slots[b, q_idx]) & self.part.keys(b, kv_idx)

    def is_own(self, b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Whether a key is that of the query itself."""
        return self.slots[b, q_idx] == kv_idx


def place_part(part: ScaledPart | None, slots: Tensor) -> PlacedPart | None:
    """Place a part for queries at ``slots`` ``(B, Q)``, a tensor that stays where it is."""
    if part is None or part.scale == 1:
        return None
    mark_static(slots)  # as LayoutBatch's, for flex's CPU kernel
    return PlacedPart(part, slots)


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
        placed: What is scaled.
        score_mod: What changes scores before.
        query: ``(B, H, Q, D)``.
        key: ``(B, H_kv, K, D)``.
        own_key: ``(B, H_kv, Q, D)``, the keys of the queries themselves.
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

    log_sum_exp, size = torch.ops.flexmask.part_log_sum_exp, placed.slots.shape
    values, own_score = _which(placed.part, key), _own_scores(query, own_key, scaling)
    near = log_sum_exp(attend(values, coarse), own_score, COARSE, *size)
    sums = log_sum_exp(attend(values, exact), near, 1.0, *size)
    factor = placed.part.scale - 1.0

    def scaled(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score = changed(score, b, h, q_idx, kv_idx)
        return torch.where(
            placed.holds(b, q_idx, kv_idx), score + factor * sums[b, h, q_idx], score
        )

    return scaled


def _which(part: ScaledPart, key: Tensor) -> Tensor:
    """Values that say what a key is: 1 in the first column for the part, in the second if not."""
    rows, slots = (torch.arange(key.shape[dim], device=key.device) for dim in (0, 2))
    is_part = part.keys(rows[:, None], slots)
    columns = torch.stack((is_part, ~is_part), -1).to(key.dtype)
    columns = nn.functional.pad(columns, (0, MIN_VALUE_DIM - 2))
    return columns[:, None].expand(-1, key.shape[1], -1, -1).contiguous()


def _own_scores(query: Tensor, own_key: Tensor, scaling: float | None) -> Tensor:
    """Score of each query with its own key, ``(B, H, Q)`` in float32."""
    keys = own_key.repeat_interleave(query.shape[1] // own_key.shape[1], 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return (query.float() * keys.float()).sum(-1) * scale


# An operator of its own: flex's CPU kernel captures no tensor that inductor computes, since its
# layout is not settled yet (torch 2.13).
@torch.library.custom_op("flexmask::part_log_sum_exp", mutates_args=())
def part_log_sum_exp(
    shares: Tensor, own_score: Tensor, divisor: float, rows: int, queries: int
) -> Tensor:
    """Log-sum-exp of a part of the scores, in a tensor whose size does not follow the batch's.

    Args:
        shares: ``(B, H, Q, 2 or more)`` share of the part, and of the query's own key.
        own_score: ``(B or more, H, Q or more)`` score of the query's own key, undivided.
        divisor: What scores were divided by; unless 1, the result is only near.
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
