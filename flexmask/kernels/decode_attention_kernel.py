"""The Triton kernels of `flexmask::decode_attention`: one query per row over the cached keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    key_slots_ptr,
    sharing_ptr,
    shared_ptr,
    shared_max_ptr,
    shared_sum_ptr,
    out_ptr,
    partial_ptr,
    max_ptr,
    sum_ptr,
    arrived_ptr,
    scale,
    softcap,
    cache_rows,
    capacity,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    JOIN_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend from the query heads of one key head over one share of the keys.

    The first program of a key head also attends to the query's own key and value, and writes them
    to the cache. The last program to arrive joins the shares, always in the same order. With
    ``PDL`` a program may start while the kernel before it still runs. The slots, and the keys and
    values of earlier steps, are in memory by then, so the program prefetches the first ``AHEAD``
    keys before it waits. With ``HAS_TABLE`` the slots of the keys are read from a `KeyTable`, and
    the first share begins with what `shared_keys_kernel` has found.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = pair // KV_HEADS
    kv_head = pair % KV_HEADS
    g = tl.arange(0, BLOCK_G)
    is_head = g < GROUP
    head = kv_head * GROUP + tl.minimum(g, GROUP - 1)
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_V)
    slot = tl.load(slots_ptr + b)
    num_keys = slot
    num_shared = 0
    if HAS_TABLE:
        num_shared = tl.load(sharing_ptr + b * 3 + 1)
        copies = tl.load(sharing_ptr + b * 3 + 2)
        num_keys -= tl.maximum(copies - 1, 0) * num_shared
    share = tl.cdiv(tl.cdiv(num_keys - num_shared, BLOCK_N), SPLITS) * BLOCK_N
    start = num_shared + split * share
    stop = tl.minimum(start + share, num_keys)
    base = (kv_head * cache_rows + b).to(tl.int64) * capacity
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            _prefetch(k_cache_ptr + base * K_DIM, start * K_DIM, stop * K_DIM, AHEAD * BLOCK_K)
            _prefetch(v_cache_ptr + base * V_DIM, start * V_DIM, stop * V_DIM, AHEAD * BLOCK_V)
        tl.extra.cuda.gdc_wait()
    angle = b * K_DIM + d
    q_row = q_ptr + b * stride_qb + head[:, None] * stride_qh
    q = _rotated(q_row, cos_ptr, sin_ptr, angle[None, :], d[None, :], K_DIM, ROTATED)
    biggest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    if HAS_TABLE:
        place = b * KV_HEADS * GROUP + head
        is_first = split + tl.zeros((BLOCK_G,), tl.int32) == 0
        biggest = tl.load(shared_max_ptr + place, mask=is_first, other=float("-inf"))
        total = tl.load(shared_sum_ptr + place, mask=is_first, other=0.0)
        is_value = is_first[:, None] & (e < V_DIM)[None, :]
        shared = shared_ptr + place[:, None] * V_DIM + e[None, :]
        acc = tl.load(shared, mask=is_value, other=0.0)
    k_row = k_ptr + b * stride_kb + kv_head * stride_kh
    own_key = _rotated(k_row, cos_ptr, sin_ptr, angle, d, K_DIM, ROTATED)
    v_row = v_ptr + b * stride_vb + kv_head * stride_vh
    own_value = tl.load(v_row + e, mask=e < V_DIM, other=0.0)
    biggest, total, acc = _over_keys(
        biggest, total, acc, q, k_cache_ptr, v_cache_ptr, key_slots_ptr + b * capacity, base,
        start, stop, is_head, biggest, scale, softcap, K_DIM, V_DIM, HAS_SOFTCAP, HAS_TABLE,
        False, BLOCK_N, BLOCK_K, BLOCK_V, STAGES,
    )  # fmt: skip
    if split == 0:
        tl.store(k_cache_ptr + (base + slot) * K_DIM + d, own_key, mask=d < K_DIM)
        tl.store(v_cache_ptr + (base + slot) * V_DIM + e, own_value, mask=e < V_DIM)
        products = tl.sum(q.to(tl.float32) * own_key.to(tl.float32)[None, :], 1)
        score = _log2_scores(products, scale, softcap, HAS_SOFTCAP)
        new_biggest = tl.maximum(biggest, score)
        weights = tl.exp2(score - new_biggest)
        decay = tl.exp2(biggest - new_biggest)
        total = total * decay + weights
        acc = acc * decay[:, None] + weights[:, None] * own_value.to(tl.float32)[None, :]
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


@triton.jit
def shared_keys_kernel(
    q_ptr,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    key_slots_ptr,
    sharing_ptr,
    shared_ptr,
    shared_max_ptr,
    shared_sum_ptr,
    scale,
    softcap,
    batch_size,
    cache_rows,
    capacity,
    stride_qb,
    stride_qh,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend from the query heads of one key head in ``ROWS`` rows over the keys that rows share.

    These keys are read once for all of these rows, and each counts once for each copy that a row
    has of it. `decode_attention_kernel` goes on with the maxima, sums and values written here; a
    row without copies gets a maximum of minus infinity.
    """
    kv_head = tl.program_id(1)
    g = tl.arange(0, BLOCK_G)
    b = tl.program_id(0) * ROWS + g // GROUP
    is_query = (g < ROWS * GROUP) & (b < batch_size)
    b = tl.minimum(b, batch_size - 1)
    head = kv_head * GROUP + g % GROUP
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_V)
    copies = tl.load(sharing_ptr + b * 3 + 2)
    is_sharing = is_query & (copies > 0)
    num_shared = tl.max(tl.where(is_sharing, tl.load(sharing_ptr + b * 3 + 1), 0), 0)
    source = tl.max(tl.where(is_sharing, tl.load(sharing_ptr + b * 3), 0), 0)
    listed_in = tl.max(tl.where(is_sharing, b, 0), 0)
    log2_copies = tl.log2(tl.maximum(copies, 1).to(tl.float32))
    base = (kv_head * cache_rows + source).to(tl.int64) * capacity
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    q_row = q_ptr + b[:, None] * stride_qb + head[:, None] * stride_qh
    angle = b[:, None] * K_DIM + d[None, :]
    q = _rotated(q_row, cos_ptr, sin_ptr, angle, d[None, :], K_DIM, ROTATED)
    biggest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    biggest, total, acc = _over_keys(
        biggest, total, acc, q, k_cache_ptr, v_cache_ptr, key_slots_ptr + listed_in * capacity,
        base, 0, num_shared, is_sharing, log2_copies, scale, softcap, K_DIM, V_DIM, HAS_SOFTCAP,
        True, True, BLOCK_N, BLOCK_K, BLOCK_V, STAGES,
    )  # fmt: skip
    place = b * KV_HEADS * GROUP + head
    tl.store(shared_max_ptr + place, biggest, mask=is_query)
    tl.store(shared_sum_ptr + place, total, mask=is_query)
    is_out = is_query[:, None] & (e < V_DIM)[None, :]
    tl.store(shared_ptr + place[:, None] * V_DIM + e[None, :], acc, mask=is_out)


@triton.jit
def _over_keys(
    biggest,
    total,
    acc,
    q,
    k_cache_ptr,
    v_cache_ptr,
    key_slots_ptr,
    base,
    start,
    stop,
    is_sharing,
    log2_copies,
    scale,
    softcap,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Go on with an online softmax over the keys from ``start`` to ``stop``.

    With ``HAS_TABLE`` these are places in ``key_slots_ptr``, which names the slots. With
    ``HAS_COPIES`` each key counts once for each copy, and for queries that are sharing only.
    """
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_V)
    for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        n = first + tl.arange(0, BLOCK_N)
        is_key = n < stop
        key_row = base + n
        if HAS_TABLE:
            key_row = base + tl.load(key_slots_ptr + n, mask=is_key, other=0)
        is_k = is_key[:, None] & (d < K_DIM)[None, :]
        keys = tl.load(k_cache_ptr + key_row[:, None] * K_DIM + d[None, :], mask=is_k, other=0.0)
        is_v = is_key[:, None] & (e < V_DIM)[None, :]
        values = tl.load(v_cache_ptr + key_row[:, None] * V_DIM + e[None, :], mask=is_v, other=0.0)
        products = tl.dot(q, tl.trans(keys), input_precision="ieee")
        score = _log2_scores(products, scale, softcap, HAS_SOFTCAP)
        is_seen = is_key[None, :]
        if HAS_COPIES:
            score += log2_copies[:, None]
            is_seen = is_seen & is_sharing[:, None]
        score = tl.where(is_seen, score, float("-inf"))
        new_biggest = tl.maximum(biggest, tl.max(score, 1))
        finite = new_biggest
        if HAS_COPIES:  # rows without copies have no finite maximum
            finite = tl.maximum(new_biggest, -1e30)
        weights = tl.exp2(score - finite[:, None])
        decay = tl.exp2(biggest - finite)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        biggest = new_biggest
    return biggest, total, acc


@triton.jit
def _rotated(row_ptr, cos_ptr, sin_ptr, angle, d, DIM: tl.constexpr, ROTATED: tl.constexpr):
    """Load heads, and apply rotary embeddings to them if ``ROTATED``."""
    x = tl.load(row_ptr + d, mask=d < DIM, other=0.0)
    if ROTATED:
        half: tl.constexpr = DIM // 2
        partner = tl.load(
            row_ptr + tl.where(d < half, d + half, d - half), mask=d < DIM, other=0.0
        )
        cos = tl.load(cos_ptr + angle, mask=d < DIM, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=d < DIM, other=0.0).to(tl.float32)
        turned = tl.where(d < half, -sin, sin) * partner.to(tl.float32)
        x = (x.to(tl.float32) * cos + turned).to(x.dtype)
    return x


@triton.jit
def _log2_scores(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scale and soft-cap the products of query and keys; return the scores times log2(e)."""
    score = products * scale
    if HAS_SOFTCAP:
        score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
    return score * 1.4426950408889634


@triton.jit
def _prefetch(ptr, first, stop, COUNT: tl.constexpr):
    """Prefetch ``COUNT`` numbers from ``first`` on to the L2 cache, without waiting."""
    LINE: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth
    offset = first + tl.arange(0, COUNT // LINE) * LINE
    address = (ptr + tl.minimum(offset, tl.maximum(stop - 1, 0))).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [address],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
