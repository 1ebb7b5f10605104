"""Whether the rows of a decode step see every key before them, proved and not assumed."""

from __future__ import annotations

from torch import Tensor

from flexmask.block_mask.create import create_block_mask
from flexmask.block_mask.rules import MaskMod


def rows_are_causal(mask_mod: MaskMod, first_slots: Tensor, KV_LEN: int) -> bool:
    """Whether from a slot on, each query sees exactly the slots up to its own.

    The difference of the mask from a causal one is built as a BlockMask; it has no tiles if and
    only if there is none. One synchronisation with the device.

    Args:
        mask_mod: What a query may see, whatever the head; it gets slots.
        first_slots: ``(B,)`` first slot of each batch row that is asked about.
        KV_LEN: Number of slots; the last query asked about is at the last of them.

    Raises:
        MaskError: If the mask_mod breaks a rule of FlexAttention.
    """
    num_queries = KV_LEN - int(first_slots.min())

    def differs(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        slot = (first_slots[b] + q_idx).clamp(max=KV_LEN - 1)
        return (kv_idx <= slot) & ~mask_mod(b, h, slot, kv_idx)

    tiles = create_block_mask(
        differs, len(first_slots), None, num_queries, KV_LEN, first_slots.device
    )
    assert tiles.full_kv_num_blocks is not None
    return not bool((tiles.kv_num_blocks + tiles.full_kv_num_blocks).any())
