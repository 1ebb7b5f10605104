"""Checks of attention: runs every path on this device, and compares with dense attention."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from flexmask.attention.backend import dense_attention, flexmask_attention
from flexmask.block_mask import DecodeRowMask, create_block_mask
from flexmask.doctor.check_result import Check, WrongResult, tried
from flexmask.engine.prefill_kernel import has_flash
from flexmask.layout import TokenizedRequest, shared_prefix_layout
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import (
    and_masks,
    causal,
    holds_tokens,
    is_fusion_tail,
    is_prefix,
    or_masks,
    same_segment,
)
from flexmask.mod_types import MaskMod

LENGTH, TILE = 256, 128
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest difference from dense attention in float32, for values of about one."""
HOPPER = (9, 0)


def check_prefill(device: torch.device) -> Check:
    """Check compiled FlexAttention for many queries."""
    return tried(
        "attention, prefill",
        lambda: _compared(device, torch.arange(LENGTH, device=device)),
        "torch.compile does not work here; see the compiler's line, or run where it does",
    )


def check_decode(device: torch.device) -> Check:
    """Check compiled FlexAttention for one query, with the mask that decoding updates in place."""
    return tried(
        "attention, decode",
        lambda: _compared(device, torch.tensor([LENGTH - 1], device=device)),
        "torch.compile does not work here for one query; see the compiler's line",
    )


def check_flash(device: torch.device) -> Check:
    """Check FlexAttention's FLASH backend (flash-attn-4), and that it skips empty tiles."""
    name = "attention, FLASH"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        return Check(name, "unavailable", "needs a GPU of capability 9.0 or more")
    if not has_flash():
        advice = "pip install flash-attn-4 for faster long prompts"
        return Check(name, "unavailable", "flash-attn-4 is not installed", advice)
    return tried(
        name,
        lambda: _flash_compared(device),
        "reinstall flash-attn-4 in a version for this torch",
        is_needed=False,
    )


def check_cuda_graph(device: torch.device) -> Check:
    """Check that work can be captured as a CUDA graph and replayed."""
    if device.type != "cuda":
        return Check("CUDA graph", "unavailable", "needs a GPU")
    return tried(
        "CUDA graph",
        lambda: _replayed(device),
        "update the GPU's driver; until then decoding runs without a graph, more slowly",
        is_needed=False,
    )


def _compared(device: torch.device, slots: Tensor) -> str:
    """Attend with queries at ``slots``, compiled and densely; return the message of success."""
    mask_mod = _mask_mod(device)
    block_mask = _block_mask(mask_mod, slots)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = _inputs(device, dtype, len(slots))
    module = nn.Module()
    with torch.no_grad():
        found, _ = flexmask_attention(module, query, key, value, block_mask)
        dense = _dense_mask(mask_mod, slots)
        wanted, _ = dense_attention(module, query.float(), key.float(), value.float(), dense)
    return _agreement(found, wanted)


def _flash_compared(device: torch.device) -> str:
    slots = torch.arange(LENGTH, device=device)
    causal_tiles = create_block_mask(causal, 1, None, LENGTH, LENGTH, device)
    first_tile = (slots < TILE).expand(1, 1, LENGTH, LENGTH)
    _under_flash(first_tile_only(device), first_tile, "keys that only tiles hide: ")
    return _under_flash(causal_tiles, _dense_mask(causal, slots), "")


def _under_flash(block_mask: BlockMask, dense: Tensor, what: str) -> str:
    query, key, value = _inputs(dense.device, torch.bfloat16, LENGTH)
    module = nn.Module()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its compiler warns about arguments that it passes itself
        found, _ = flexmask_attention(
            module, query, key, value, block_mask, prefill_kernel="flash"
        )
        wanted, _ = dense_attention(module, query.float(), key.float(), value.float(), dense)
    return _agreement(found, wanted, what)


def first_tile_only(device: torch.device) -> BlockMask:
    """Return a mask that hides all keys after the first tile, by the list of tiles alone.

    FLASH attends to every tile if the mask_mod allows all pairs, in some versions
    (https://github.com/pytorch/pytorch/issues/188322).
    """

    def allows_all(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return b.new_ones((), dtype=torch.bool)

    tiles = LENGTH // TILE
    none = torch.zeros(1, 1, tiles, dtype=torch.int32, device=device)
    order = torch.arange(tiles, dtype=torch.int32, device=device).expand(1, 1, tiles, tiles)
    return BlockMask.from_kv_blocks(
        none,
        order.contiguous(),
        none + 1,
        order.contiguous(),
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=allows_all,
        seq_lengths=(LENGTH, LENGTH),
        compute_q_blocks=False,
    )


def _replayed(device: torch.device) -> str:
    number = torch.zeros((), device=device)
    number += 1  # loads what a capture needs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        number += 1
    graph.replay()
    graph.replay()
    if (counted := number.item()) != 3:
        raise WrongResult(f"two replays counted to {counted}, expected 3")
    return "captured and replayed"


def _mask_mod(device: torch.device) -> MaskMod:
    """Return the mask of two segments after a shared prefix, and a tail that sees all."""
    token = (1,)
    request = TokenizedRequest(token * 40, (token * 100, token * 90), token * (LENGTH - 230))
    layout = shared_prefix_layout(request, "restart")
    batch = LayoutBatch(1, LENGTH, device)
    batch.load([layout], [LENGTH], [0])
    visible = or_masks(same_segment(batch), is_prefix(batch), is_fusion_tail(batch))
    return and_masks(causal, visible, holds_tokens(batch))


def _block_mask(mask_mod: MaskMod, slots: Tensor) -> BlockMask:
    if len(slots) > 1:
        return create_block_mask(mask_mod, 1, None, LENGTH, LENGTH, slots.device)
    rows = DecodeRowMask(mask_mod, 1, LENGTH, slots.device)
    rows.update(slots)
    return rows.block_mask


def _dense_mask(mask_mod: MaskMod, slots: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.long, device=slots.device)
    keys = torch.arange(LENGTH, device=slots.device)
    return mask_mod(zero, zero, slots[:, None], keys).expand(1, 1, len(slots), LENGTH)


def _inputs(
    device: torch.device, dtype: torch.dtype, queries: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, length: int) -> Tensor:
        tensor = torch.randn(1, heads, length, HEAD_DIM, generator=generator)
        return tensor.to(device=device, dtype=dtype)

    return random(HEADS, queries), random(KV_HEADS, LENGTH), random(KV_HEADS, LENGTH)


def _agreement(found: Tensor, wanted: Tensor, what: str = "") -> str:
    difference = (found.float() - wanted).abs().max().item()
    if not difference < TOLERANCE[found.dtype]:  # true for NaN too
        raise WrongResult(f"{what}differs from dense attention by {difference:.2g}")
    dtype = str(found.dtype).removeprefix("torch.")
    return f"compiled in {dtype} on {found.device}, within {difference:.0e} of dense attention"
