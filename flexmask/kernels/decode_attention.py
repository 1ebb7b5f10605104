"""The operator ``flexmask::decode_attention``: one query per row over all keys before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexmask.kernels.launch import (
    FUSED_FLOATS,
    arrival_counters,
    power_of_two,
    starts_early,
    tile_bytes,
)

NUM_PROGRAMS = 128
"""Programs that suffice to use the memory bandwidth of a large GPU; more cost more to join."""

MIN_SHARE = 64
"""Fewest keys for which a share of its own pays."""

MOST_QUERIES = 64
"""Most queries of a program that reads shared keys: rows of a tile of tensor cores."""


class KeyTable(NamedTuple):
    """The slots of the keys of each row, with the keys of a cached prefix listed once.

    The first keys of a row may be those of the cached prefix. One row holds them for all rows
    that have copies, which list the same slots of it. Each counts as many times as the prompt of
    the row has copies of it.

    Attributes:
        key_slots: ``(B, capacity)`` int32 slot of each key, except that of the row's last token.
        sharing: ``(B, 3)`` int32: the row that holds the shared keys, the number of these keys,
            and the number of copies in the slots of this row; the last two are 0 without copies.
    """

    key_slots: Tensor
    sharing: Tensor


def pays_key_table(pairs: int) -> bool:
    """Return whether a `KeyTable` makes decoding faster.

    With few pairs, a program prefetches its keys while the kernel before it still runs, and
    looking their slots up first would cost more than it saves.

    Args:
        pairs: Rows times key heads.
    """
    return pairs > NUM_PROGRAMS


# Declared by hand, because torch.library.custom_op adds 0.1 ms to each call, which counts for a
# small model on a CPU.
_LIBRARY = torch.library.Library("flexmask", "FRAGMENT")
_LIBRARY.define(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, "
    "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots, float scale, float softcap, "
    "Tensor? key_slots=None, Tensor? sharing=None) -> Tensor"
)


@torch.library.impl(_LIBRARY, "decode_attention", "CPU")
def plain_decode_attention(
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
    key_slots: Tensor | None = None,
    sharing: Tensor | None = None,
) -> Tensor:
    """Write one key and value per row to the cache, and attend to all keys up to it.

    This is the reference, made of torch's own operations; it runs on a CPU.

    Args:
        query: ``(B, H, D)``.
        key: ``(B, H_kv, D)``.
        value: ``(B, H_kv, D_v)``.
        cos: ``(B, D)`` cosines of the rotary embeddings that query and key are rotated by first;
            None if they are rotated already.
        sin: ``(B, D)`` sines.
        key_cache: ``(H_kv, R, capacity, D)``, the first ``B`` of its ``R`` rows for the queries.
        value_cache: ``(H_kv, R, capacity, D_v)``.
        slots: ``(B,)`` slot of each row's key and value.
        scale: Factor on the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0 for no soft-capping.
        key_slots: `KeyTable.key_slots`; None for all slots up to the row's own.
        sharing: `KeyTable.sharing`, given together with ``key_slots``.

    Returns:
        ``(B, H, D_v)``.
    """
    if cos is not None and sin is not None:
        query, key = (_rotated(heads, cos[:, None], sin[:, None]) for heads in (query, key))
    count, slot_of_row = len(slots), slots.tolist()
    length = max(slot_of_row) + 1
    if min(slot_of_row) == max(slot_of_row):
        key_cache[:, :count, length - 1] = key.transpose(0, 1)
        value_cache[:, :count, length - 1] = value.transpose(0, 1)
        mask = None
    else:
        rows = torch.arange(len(slots), device=slots.device)
        key_cache[:, rows, slots] = key.transpose(0, 1)
        value_cache[:, rows, slots] = value.transpose(0, 1)
        index = torch.arange(length, device=slots.device)
        mask = (index <= slots[:, None])[:, None, None]
    keys, values = (
        cache[:, :count, :length].transpose(0, 1) for cache in (key_cache, value_cache)
    )
    if key_slots is not None and sharing is not None:
        table = KeyTable(key_slots, sharing)
        keys, values, mask = _keys_of_table(table, key_cache, value_cache, slots)
    if not softcap:
        return nn.functional.scaled_dot_product_attention(
            query[:, :, None], keys, values, mask, scale=scale, enable_gqa=True
        )[:, :, 0]
    groups = query.shape[1] // keys.shape[1]
    keys, values = (heads.repeat_interleave(groups, 1).float() for heads in (keys, values))
    scores = softcap * torch.tanh((keys @ query.float()[..., None])[..., 0] * scale / softcap)
    if mask is not None:
        bias = torch.where(mask, 0.0, float("-inf")) if mask.dtype == torch.bool else mask
        scores = scores + bias[:, 0]
    return (scores.softmax(-1)[:, :, None] @ values)[:, :, 0].to(query.dtype)


def _keys_of_table(
    table: KeyTable, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the keys and values of a table and those at ``slots``, and a bias of their scores."""
    source, num_shared, copies = table.sharing.long().unbind(1)
    num_keys = slots - (copies - 1).clamp(min=0) * num_shared
    index = torch.arange(int(num_keys.max()) + 1, device=slots.device)
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    is_shared = index < num_shared[:, None]
    key_slots = table.key_slots[:, : len(index)].long()
    key_slots = torch.where(index < num_keys[:, None], key_slots, slots[:, None])
    holders = torch.where(is_shared, source[:, None], rows)
    bias = torch.where(is_shared, copies.clamp(min=1).float().log()[:, None], 0.0)
    bias = bias.masked_fill(index > num_keys[:, None], float("-inf"))
    keys, values = (
        cache[:, holders, key_slots].transpose(0, 1) for cache in (key_cache, value_cache)
    )
    return keys, values, bias[:, None, None].to(keys.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _fake_decode_attention(
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
    key_slots: Tensor | None = None,
    sharing: Tensor | None = None,
) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[-1])


torch.library.register_fake("flexmask::decode_attention", _fake_decode_attention, lib=_LIBRARY)


@torch.library.impl(_LIBRARY, "decode_attention", "CUDA")
def _fast_decode_attention(
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
    key_slots: Tensor | None = None,
    sharing: Tensor | None = None,
) -> Tensor:
    from flexmask.kernels.decode_attention_kernel import (
        decode_attention_kernel,
        shared_keys_kernel,
    )

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    batch_size, heads, key_dim = query.shape
    kv_heads, cache_rows, capacity, value_dim = value_cache.shape
    group = heads // kv_heads
    splits = num_splits(batch_size * kv_heads, capacity)
    block_k, block_v = (max(16, power_of_two(dim)) for dim in (key_dim, value_dim))
    has_table = key_slots is not None
    block_n, stages, ahead = key_tiles(
        batch_size * kv_heads * splits, capacity // splits, has_table=has_table
    )
    bytes_per_key = stages * (block_k + block_v) * query.element_size()
    while block_n > 16 and block_n * bytes_per_key > tile_bytes(query.device):
        block_n //= 2
    parts = (batch_size * heads * splits,) if splits > 1 else (1,)
    out = query.new_empty(batch_size, heads, value_dim)
    partial = torch.empty(*parts, value_dim, dtype=torch.float32, device=query.device)
    biggest, total = torch.empty(2, *parts, dtype=torch.float32, device=query.device)
    has_pdl = starts_early(query.device)
    cosines, sines = (query if angles is None else angles.contiguous() for angles in (cos, sin))
    constants: dict[str, Any] = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "K_DIM": key_dim,
        "V_DIM": value_dim,
        "ROTATED": cos is not None,
        "HAS_SOFTCAP": softcap != 0.0,
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "PDL": has_pdl,
        "num_warps": 4,
        "launch_pdl": has_pdl,
        **FUSED_FLOATS,
    }
    shared = shared_max = shared_sum = out
    if key_slots is not None:
        pairs = batch_size * heads
        shared = torch.empty(pairs, value_dim, dtype=torch.float32, device=query.device)
        shared_max, shared_sum = torch.empty(2, pairs, dtype=torch.float32, device=query.device)
        block_g = block_of_queries(batch_size, kv_heads, group)
        rows = block_g // group
        shared_keys_kernel[(-(-batch_size // rows), kv_heads)](
            query,
            cosines,
            sines,
            key_cache,
            value_cache,
            key_slots,
            sharing,
            shared,
            shared_max,
            shared_sum,
            scale,
            softcap or 1.0,
            batch_size,
            cache_rows,
            capacity,
            *query.stride()[:2],
            ROWS=rows,
            BLOCK_G=block_g,
            BLOCK_N=min(64, block_n),
            STAGES=2,
            **constants,
        )
    decode_attention_kernel[(batch_size * kv_heads, splits)](
        query,
        key,
        value,
        cosines,
        sines,
        key_cache,
        value_cache,
        slots,
        slots if key_slots is None else key_slots,
        slots if sharing is None else sharing,
        shared,
        shared_max,
        shared_sum,
        out,
        partial,
        biggest,
        total,
        arrival_counters(query.device, batch_size * kv_heads),
        scale,
        softcap or 1.0,
        cache_rows,
        capacity,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        HAS_TABLE=has_table,
        SPLITS=splits,
        BLOCK_G=max(16, power_of_two(group)),
        JOIN_G=power_of_two(group),
        BLOCK_N=block_n,
        STAGES=stages,
        AHEAD=ahead,
        **constants,
    )
    return out


decode_attention = torch.ops.flexmask.decode_attention
"""The operator; `plain_decode_attention` documents its arguments and result."""


def num_splits(pairs: int, capacity: int) -> int:
    """Choose the number of shares that the keys are divided into.

    Args:
        pairs: Rows times key heads.
        capacity: Slots per row.
    """
    wanted = min(NUM_PROGRAMS // pairs, capacity // MIN_SHARE)
    return 1 << (max(1, wanted).bit_length() - 1)


def block_of_queries(batch_size: int, kv_heads: int, group: int) -> int:
    """Choose the queries that share reads of a cached prefix: as many as leave enough programs.

    Args:
        batch_size: Rows.
        kv_heads: Key heads.
        group: Query heads per key head.
    """
    block = max(MOST_QUERIES, power_of_two(group))
    while block > max(16, power_of_two(group)) and (
        -(-batch_size // (block // group)) * kv_heads < NUM_PROGRAMS * 3 // 4
    ):
        block //= 2
    return block


def key_tiles(programs: int, share: int, *, has_table: bool) -> tuple[int, int, int]:
    """Choose how programs read their keys, as measured on an H200 for 1k to 16k keys.

    A program that has a multiprocessor to itself gains by reading far ahead. Programs that share
    one hide each other's latency.

    Args:
        programs: Programs of the launch.
        share: Keys of each program.
        has_table: True if the slots of keys are read from a table, which takes another load
            before each tile.

    Returns:
        Keys per tile, tiles in flight, and keys that a program prefetches while the kernel before
        it still runs.
    """
    if has_table:
        return 32, 3, 0
    if programs > NUM_PROGRAMS:
        return 64, 2, 0
    return (64, 2, 128) if share < 256 else (128, 3, 128)
