"""The operator ``flexmask::decode_attention``: one query per row over all that came before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexmask.kernels.launch import (
    arrival_counters,
    power_of_two,
    starts_early,
    tile_bytes,
)

NUM_PROGRAMS = 128
"""Programs that keep the memory of a large GPU busy; more only have more to join."""

MIN_SHARE = 64
"""Keys below which a share of its own does not pay."""


@torch.library.custom_op(
    "flexmask::decode_attention", mutates_args=("key_cache", "value_cache"), device_types="cpu"
)
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """Put one key and value per row into the cache, and attend to all up to it.

    This is the plain way, with what torch has.

    Args:
        query: ``(B, H, D)``.
        key: ``(B, H_kv, D)``.
        value: ``(B, H_kv, D_v)``.
        cos: ``(B, D)``; given, query and key are first turned by rotary embeddings, half of
            each head against the other.
        sin: ``(B, D)``.
        key_cache: ``(B, H_kv, capacity, D)``.
        value_cache: ``(B, H_kv, capacity, D_v)``.
        slots: ``(B,)`` where each row's key and value go.
        scale: Factor on the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0 leaves them.

    Returns:
        ``(B, H, D_v)``.
    """
    if cos is not None and sin is not None:
        query, key = (_rotated(heads, cos[:, None], sin[:, None]) for heads in (query, key))
    rows = torch.arange(len(slots), device=slots.device)
    key_cache[rows, :, slots] = key
    value_cache[rows, :, slots] = value
    length = int(slots.max()) + 1
    keys, values = key_cache[:, :, :length], value_cache[:, :, :length]
    is_seen = torch.arange(length, device=query.device) <= slots[:, None]
    if not softcap:
        return nn.functional.scaled_dot_product_attention(
            query[:, :, None],
            keys,
            values,
            is_seen[:, None, None],
            scale=scale,
            enable_gqa=True,
        )[:, :, 0]
    groups = query.shape[1] // keys.shape[1]
    keys, values = (heads.repeat_interleave(groups, 1).float() for heads in (keys, values))
    scores = softcap * torch.tanh((keys @ query.float()[..., None])[..., 0] * scale / softcap)
    weights = scores.masked_fill(~is_seen[:, None], float("-inf")).softmax(-1)
    return (weights[:, :, None] @ values)[:, :, 0].to(query.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@decode_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[-1])


@decode_attention.register_kernel("cuda")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    from flexmask.kernels.decode_attention_kernel import decode_attention_kernel

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    batch_size, heads, key_dim = query.shape
    _, kv_heads, capacity, value_dim = value_cache.shape
    group = heads // kv_heads
    splits = num_splits(batch_size * kv_heads, capacity)
    block_k, block_v = (max(16, power_of_two(dim)) for dim in (key_dim, value_dim))
    block_n, stages, ahead = key_tiles(batch_size * kv_heads * splits, capacity // splits)
    bytes_per_key = stages * (block_k + block_v) * query.element_size()
    while block_n > 16 and block_n * bytes_per_key > tile_bytes(query.device):
        block_n //= 2
    parts = (batch_size * heads * splits,) if splits > 1 else (1,)
    out = query.new_empty(batch_size, heads, value_dim)
    partial = torch.empty(*parts, value_dim, dtype=torch.float32, device=query.device)
    biggest, total = torch.empty(2, *parts, dtype=torch.float32, device=query.device)
    has_pdl = starts_early(query.device)
    decode_attention_kernel[(batch_size * kv_heads, splits)](
        query,
        key,
        value,
        query if cos is None else cos.contiguous(),
        query if sin is None else sin.contiguous(),
        key_cache,
        value_cache,
        slots,
        out,
        partial,
        biggest,
        total,
        arrival_counters(query.device, batch_size * kv_heads),
        scale,
        softcap or 1.0,
        capacity,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        KV_HEADS=kv_heads,
        GROUP=group,
        K_DIM=key_dim,
        V_DIM=value_dim,
        ROTATED=cos is not None,
        HAS_SOFTCAP=softcap != 0.0,
        SPLITS=splits,
        BLOCK_G=max(16, power_of_two(group)),
        JOIN_G=power_of_two(group),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        STAGES=stages,
        AHEAD=ahead,
        PDL=has_pdl,
        num_warps=4,
        launch_pdl=has_pdl,
    )
    return out


def num_splits(pairs: int, capacity: int) -> int:
    """Shares that the keys of each of ``pairs`` rows and key heads are divided into."""
    wanted = min(NUM_PROGRAMS // pairs, capacity // MIN_SHARE)
    return 1 << (max(1, wanted).bit_length() - 1)


def key_tiles(programs: int, share: int) -> tuple[int, int, int]:
    """Choose how programs read their keys, as measured on an H200 for 1k to 16k keys.

    Returns:
        Keys of a tile, tiles under way together, and keys that a program asks for while the
        kernel before it still runs. A program that has a multiprocessor to itself reads far
        ahead; many that share one keep each other busy, and small ones all fit at once.
    """
    if programs > NUM_PROGRAMS:
        return 64, 2, 0
    return (64, 2, 128) if share < 256 else (128, 3, 128)
