"""Attention weights as a matrix, in float32: the reference, and for few queries at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from flexmask.attention.scaled_part import PlacedPart
    from flexmask.mod_types import ScoreMod


def dense_weights(
    query: Tensor,
    key: Tensor,
    is_seen: Tensor,
    indices: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    scaled_part: PlacedPart | None = None,
) -> Tensor:
    """Compute attention weights; a query that sees nothing gets zeros.

    Args:
        query: ``(B, H, Q, D)``.
        key: ``(B, H_kv, K, D)``, with ``H`` a multiple of ``H_kv``.
        is_seen: Bool, broadcast to ``(B, H, Q, K)``.
        indices: Indices of batch row, head, query and key as ``score_mod`` and ``scaled_part``
            number them, each of which varies along its own dimension of four.
        scaling: Factor on the scores; default ``D ** -0.5``.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        score_mod: Changes scores, after scaling and capping.
        scaled_part: Keys whose log-sum-exp is scaled, after ``score_mod``.

    Returns:
        ``(B, H, Q, K)`` float32.
    """
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query.float() @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    b, h, q_idx, kv_idx = indices
    if score_mod is not None:
        scores = score_mod(scores, b, h, q_idx, kv_idx)
    if scaled_part is not None:
        in_part = scaled_part.holds(b, q_idx, kv_idx) & is_seen
        sums = scores.masked_fill(~in_part, float("-inf")).logsumexp(-1, keepdim=True)
        scores = (scores + (scaled_part.part.scale - 1) * sums).where(in_part, scores)
    return scores.masked_fill(~is_seen, float("-inf")).softmax(-1).nan_to_num()


def index_axes(*indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Let indices of rows, heads, queries and keys vary along their own dimension of four."""
    b, h, q_idx, kv_idx = (
        index.view(-1, *[1] * (3 - dimension)) for dimension, index in enumerate(indices)
    )
    return b, h, q_idx, kv_idx
