"""Proves that two masks are equal, through the BlockMask of their difference."""

from __future__ import annotations

import torch
from torch import Tensor

from flexmask.block_mask.create import create_block_mask
from flexmask.mod_types import MaskMod


def masks_are_equal(
    first: MaskMod, second: MaskMod, B: int, Q_LEN: int, KV_LEN: int, device: torch.device
) -> bool:
    """Return True if two masks that do not depend on the head allow the same pairs.

    The BlockMask of their difference has no tiles if and only if they are equal. Reading that
    synchronises once with the device.

    Args:
        first: A mask.
        second: Another mask.
        B: Number of batch rows.
        Q_LEN: Number of queries.
        KV_LEN: Number of keys.
        device: Device of the tensors that the masks capture.

    Raises:
        MaskError: If a mask_mod breaks a rule of FlexAttention.
    """

    def differs(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return first(b, h, q_idx, kv_idx) ^ second(b, h, q_idx, kv_idx)

    tiles = create_block_mask(differs, B, None, Q_LEN, KV_LEN, device)
    assert tiles.full_kv_num_blocks is not None
    return not bool((tiles.kv_num_blocks + tiles.full_kv_num_blocks).any())


def rows_are_causal(mask_mod: MaskMod, first_slots: Tensor, KV_LEN: int) -> bool:
    """Return True if each query from ``first_slots`` on sees every slot up to its own.

    Args:
        mask_mod: The mask over slots, the same for all heads.
        first_slots: ``(B,)`` slot of the first query of each batch row.
        KV_LEN: Number of slots; the last query is at the last slot.

    Raises:
        MaskError: If the mask_mod breaks a rule of FlexAttention.
    """

    def slot_of(b: Tensor, q_idx: Tensor) -> Tensor:
        return (first_slots[b] + q_idx).clamp(max=KV_LEN - 1)

    def sees(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        slot = slot_of(b, q_idx)
        return mask_mod(b, h, slot, kv_idx) & (kv_idx <= slot)

    def up_to_own(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= slot_of(b, q_idx)

    num_queries = KV_LEN - int(first_slots.min())
    return masks_are_equal(
        sees, up_to_own, len(first_slots), num_queries, KV_LEN, first_slots.device
    )


def spans_are_causal(
    mask_mod: MaskMod, rows: Tensor, starts: Tensor, length: int, KV_LEN: int, window: int | None
) -> bool:
    """Return True if each span of slots sees itself causally, and nothing else.

    Args:
        mask_mod: The mask over slots, the same for all heads.
        rows: ``(N,)`` batch row of each span.
        starts: ``(N,)`` first slot of each span.
        length: Slots of a span.
        KV_LEN: Number of slots.
        window: Largest number of keys that a query sees, including its own; None for all.

    Raises:
        MaskError: If the mask_mod breaks a rule of FlexAttention.
    """

    def sees(r: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(rows[r], h, starts[r] + q_idx, kv_idx)

    def itself(r: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        slot = starts[r] + q_idx
        seen = (kv_idx >= starts[r]) & (kv_idx <= slot)
        return seen if window is None else seen & (slot - kv_idx < window)

    return masks_are_equal(sees, itself, len(rows), length, KV_LEN, rows.device)
