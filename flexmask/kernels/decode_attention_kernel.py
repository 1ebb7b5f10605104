"""Attention of one query per row over the first keys of its cache."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    out_ptr,
    partial_ptr,
    max_ptr,
    sum_ptr,
    arrived_ptr,
    scale,
    softcap,
    capacity,
    stride_qb,
    stride_qh,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    JOIN_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program attends from the query heads of one key head over one share of the keys.

    The last program of a key head to arrive joins the shares, always in the same order.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = pair // KV_HEADS
    kv_head = pair % KV_HEADS
    g = tl.arange(0, BLOCK_G)
    is_head = g < GROUP
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_V)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    length = tl.load(slots_ptr + b) + 1
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), SPLITS) * BLOCK_N
    start = split * share
    stop = tl.minimum(start + share, length)
    head = kv_head * GROUP + g
    q_offset = b * stride_qb + head[:, None] * stride_qh + d[None, :]
    is_q = is_head[:, None] & (d < K_DIM)[None, :]
    q = tl.load(q_ptr + q_offset, mask=is_q, other=0.0)
    base = pair.to(tl.int64) * capacity
    biggest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        n = first + tl.arange(0, BLOCK_N)
        is_key = n < stop
        row = base + n
        is_k = is_key[:, None] & (d < K_DIM)[None, :]
        keys = tl.load(k_ptr + row[:, None] * K_DIM + d[None, :], mask=is_k, other=0.0)
        is_v = is_key[:, None] & (e < V_DIM)[None, :]
        values = tl.load(v_ptr + row[:, None] * V_DIM + e[None, :], mask=is_v, other=0.0)
        score = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        score = tl.where(is_key[None, :], score * 1.4426950408889634, float("-inf"))
        new_biggest = tl.maximum(biggest, tl.max(score, 1))
        weights = tl.exp2(score - new_biggest[:, None])
        decay = tl.exp2(biggest - new_biggest)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        biggest = new_biggest
    out = (b * KV_HEADS * GROUP + head)[:, None] * V_DIM + e[None, :]
    is_out = is_head[:, None] & (e < V_DIM)[None, :]
    if SPLITS == 1:
        tl.store(out_ptr + out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_out)
    else:
        part = (pair * SPLITS + split) * GROUP + g
        tl.store(max_ptr + part, biggest, mask=is_head)
        tl.store(sum_ptr + part, total, mask=is_head)
        tl.store(partial_ptr + part[:, None] * V_DIM + e[None, :], acc, mask=is_out)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + pair, 1) == SPLITS - 1:
            tl.debug_barrier()
            s = tl.arange(0, SPLITS)
            h = tl.arange(0, JOIN_G)
            parts = (pair * SPLITS + s)[:, None] * GROUP + h[None, :]
            is_part = (h < GROUP)[None, :] & (s < SPLITS)[:, None]
            biggest_of = tl.load(
                max_ptr + parts, mask=is_part, other=float("-inf"), cache_modifier=".cg"
            )
            total_of = tl.load(sum_ptr + parts, mask=is_part, other=0.0, cache_modifier=".cg")
            weight_of = tl.exp2(biggest_of - tl.maximum(tl.max(biggest_of, 0), -1e30)[None, :])
            joined_total = tl.sum(total_of * weight_of, 0)
            acc_of = tl.load(
                partial_ptr + parts[:, :, None] * V_DIM + e[None, None, :],
                mask=is_part[:, :, None] & (e < V_DIM)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            joined = tl.sum(acc_of * weight_of[:, :, None], 0)
            joined /= tl.where(h < GROUP, joined_total, 1.0)[:, None]
            joined_out = ((b * KV_HEADS + kv_head) * GROUP + h)[:, None] * V_DIM + e[None, :]
            is_joined = (h < GROUP)[:, None] & (e < V_DIM)[None, :]
            tl.store(out_ptr + joined_out, joined.to(out_ptr.dtype.element_ty), mask=is_joined)
            tl.store(arrived_ptr + pair, 0)
