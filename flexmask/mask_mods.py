"""Pointwise masks from which strategies are built.

Each is, or returns, a FlexAttention mask_mod ``(b, h, q_idx, kv_idx) -> bool tensor``, where
``q_idx`` and ``kv_idx`` are slots of row ``b``. Combine them with `and_masks` and `or_masks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flexmask.layout import PADDING, PREFIX, TAIL

if TYPE_CHECKING:
    from torch import Tensor

    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod
    from flexmask.strategy import Strategy


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Allow a token to see itself and the tokens stored before it."""
    return q_idx >= kv_idx


def same_segment(batch: LayoutBatch) -> MaskMod:
    """Allow tokens of one segment (or both prefix, or both tail) to see each other."""
    segment_ids = batch.segment_ids

    def same_segment(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return segment_ids[b, q_idx] == segment_ids[b, kv_idx]

    return same_segment


def is_prefix(batch: LayoutBatch) -> MaskMod:
    """Allow every token to see the prefix."""
    segment_ids = batch.segment_ids

    def is_prefix(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return segment_ids[b, kv_idx] == PREFIX

    return is_prefix


def is_fusion_tail(batch: LayoutBatch) -> MaskMod:
    """Allow the fusion tail and generated tokens to see every token."""
    segment_ids = batch.segment_ids

    def is_fusion_tail(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return segment_ids[b, q_idx] == TAIL

    return is_fusion_tail


def and_masks(first: MaskMod, *others: MaskMod) -> MaskMod:
    """Allow the pairs that all masks allow."""

    def and_masks(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = first(b, h, q_idx, kv_idx)
        for mask_mod in others:
            result = result & mask_mod(b, h, q_idx, kv_idx)
        return result

    return and_masks


def or_masks(first: MaskMod, *others: MaskMod) -> MaskMod:
    """Allow the pairs that any of the masks allows."""

    def or_masks(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = first(b, h, q_idx, kv_idx)
        for mask_mod in others:
            result = result | mask_mod(b, h, q_idx, kv_idx)
        return result

    return or_masks


def holds_tokens(batch: LayoutBatch) -> MaskMod:
    """Allow slots that hold a token to see each other, but no padding."""
    segment_ids = batch.segment_ids

    def holds_tokens(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (segment_ids[b, q_idx] != PADDING) & (segment_ids[b, kv_idx] != PADDING)

    return holds_tokens


def strategy_mask(strategy: Strategy, batch: LayoutBatch) -> MaskMod:
    """Return the mask of a batch as the engine uses it: the strategy's, without padding."""
    return and_masks(strategy.mask_mod(batch), holds_tokens(batch))


def layer_masks(
    strategy: Strategy, batch: LayoutBatch, windows: Mapping[str, int | None]
) -> dict[str, MaskMod]:
    """Return the strategy's mask for each kind of layer of a model.

    Args:
        strategy: The strategy.
        batch: The buffers that the masks capture.
        windows: Sliding window of each kind of layer, in tokens; None for no window.
    """
    allowed = strategy_mask(strategy, batch)
    return {
        kind: allowed if window is None else and_masks(allowed, within_window(batch, window))
        for kind, window in windows.items()
    }


def within_window(batch: LayoutBatch, window: int) -> MaskMod:
    """Allow a token to see the last ``window`` positions up to its own.

    The distance is counted in positions, not in slots, so a segment whose positions restart sees
    the same part of its prefix as it would see alone.
    """
    position_ids = batch.position_ids

    def within_window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return position_ids[b, q_idx] - position_ids[b, kv_idx] < window

    return within_window


def multiples_apart(batch: LayoutBatch, step: int) -> MaskMod:
    """Allow a token to see every ``step``-th position, counted from its own."""
    position_ids = batch.position_ids

    def multiples_apart(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (position_ids[b, q_idx] - position_ids[b, kv_idx]) % step == 0

    return multiples_apart
