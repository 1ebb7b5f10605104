"""Masks and changes of scores over slots, for queries that are stored at chosen slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from flexmask.mod_types import MaskMod, ScoreMod


def mask_at_slots(mask_mod: MaskMod, slots: Tensor) -> MaskMod:
    """Return the mask of queries at ``slots`` ``(B, Q)`` of their rows."""

    def at_slots(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, slots[b, q_idx], kv_idx)

    return at_slots


def score_at_slots(score_mod: ScoreMod, slots: Tensor) -> ScoreMod:
    """Return the change of scores of queries at ``slots`` ``(B, Q)`` of their rows."""

    def at_slots(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h, slots[b, q_idx], kv_idx)

    return at_slots


def score_from_slots(score_mod: ScoreMod, first_slots: Tensor) -> ScoreMod:
    """Return the change of scores of queries from ``first_slots`` ``(B,)`` of their rows on."""

    def from_slots(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h, first_slots[b] + q_idx, kv_idx)

    return from_slots
