"""Proves that two masks are equal, through the BlockMask of their difference."""

from __future__ import annotations

import torch
from torch import Tensor

from flexmask.block_mask.create import create_block_mask
from flexmask.mod_types import MaskMod

PROOF_TILE = (32, 128)
"""Queries and keys of a tile. Of the tiles on a diagonal every pair is compared, and small ones
hold fewer of them."""


def masks_are_equal(
    first: MaskMod, second: MaskMod, B: int, Q_LEN: int, KV_LEN: int, device: torch.device
) -> bool:
    """Return True if two masks that do not depend on the head allow the same pairs.

    Arguments and errors are those of `rows_are_equal`.
    """
    return bool(rows_are_equal(first, second, B, Q_LEN, KV_LEN, device).all())


def rows_are_equal(
    first: MaskMod, second: MaskMod, B: int, Q_LEN: int, KV_LEN: int, device: torch.device
) -> Tensor:
    """Return for each batch row whether two masks allow the same pairs, ``(B,)`` bool.

    The BlockMask of their difference has no tiles if and only if they are equal.

    Args:
        first: A mask, the same for all heads.
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

    tiles = create_block_mask(differs, B, None, Q_LEN, KV_LEN, device, PROOF_TILE)
    assert tiles.full_kv_num_blocks is not None
    return (tiles.kv_num_blocks + tiles.full_kv_num_blocks).sum((1, 2)) == 0


def rows_are_causal(
    mask_mod: MaskMod, rows: Tensor, first_slots: Tensor, num_queries: int, KV_LEN: int
) -> Tensor:
    """Return for each row whether queries from a slot on see every slot up to their own.

    Args:
        mask_mod: The mask over slots, the same for all heads.
        rows: ``(N,)`` batch rows.
        first_slots: ``(N,)`` slot of the first query of each of them.
        num_queries: Queries of each; those beyond the last slot are left out.
        KV_LEN: Number of slots.

    Returns:
        ``(N,)`` bool.

    Raises:
        MaskError: If the mask_mod breaks a rule of FlexAttention.
    """

    def slot_of(r: Tensor, q_idx: Tensor) -> Tensor:
        return (first_slots[r] + q_idx).clamp(max=KV_LEN - 1)

    def sees(r: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        slot = slot_of(r, q_idx)
        return mask_mod(rows[r], h, slot, kv_idx) & (kv_idx <= slot)

    def up_to_own(r: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= slot_of(r, q_idx)

    return rows_are_equal(sees, up_to_own, len(rows), num_queries, KV_LEN, rows.device)


def spans_are_causal(
    mask_mod: MaskMod,
    rows: Tensor,
    starts: Tensor,
    lengths: Tensor,
    KV_LEN: int,
    window: int | None,
) -> Tensor:
    """Return for each span of slots whether it sees itself causally, and nothing else.

    Args:
        mask_mod: The mask over slots, the same for all heads.
        rows: ``(N,)`` batch row of each span.
        starts: ``(N,)`` first slot of each span.
        lengths: ``(N,)`` slots of each span, at least one.
        KV_LEN: Number of slots.
        window: Largest number of keys that a query sees, including its own; None for all.

    Returns:
        ``(N,)`` bool.

    Raises:
        MaskError: If the mask_mod breaks a rule of FlexAttention.
    """

    def slot_of(r: Tensor, q_idx: Tensor) -> Tensor:
        return starts[r] + torch.minimum(q_idx, lengths[r] - 1)

    def sees(r: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(rows[r], h, slot_of(r, q_idx), kv_idx)

    def itself(r: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        slot = slot_of(r, q_idx)
        seen = (kv_idx >= starts[r]) & (kv_idx <= slot)
        return seen if window is None else seen & (slot - kv_idx < window)

    longest = int(lengths.max())
    return rows_are_equal(sees, itself, len(rows), longest, KV_LEN, rows.device)
