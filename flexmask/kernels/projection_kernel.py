"""The Triton kernel of `flexmask::project`: products of a few rows with weight matrices."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def projection_kernel(
    x_ptr,
    norm_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    s0_ptr,
    s1_ptr,
    s2_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    arrived_ptr,
    M,
    N0,
    N1,
    N2,
    eps,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLLED: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute ``BLOCK_N`` outputs of every row from one share of the columns.

    With ``BLOCK_M`` 1 a program multiplies and sums in registers; from 16 on it uses the tensor
    cores. Where there are several shares (``SPLITS``; none may be empty), the last program to
    arrive joins them, always in the same order. With ``PDL`` a program may start while the kernel
    before it still runs: it reads its first tile of weights, which no kernel writes, before it
    waits for that kernel; if unrolled, ``AHEAD`` more tiles. With ``HAS_SCALE`` weights are of 8
    bits: they are read as such, converted in registers, and each output is scaled once.
    """
    GATED: tl.constexpr = ACTIVATION != ""
    block = tl.program_id(0)
    w_ptr = w0_ptr
    b_ptr = b0_ptr
    s_ptr = s0_ptr
    N = N0
    out_offset = 0
    if not GATED:
        blocks0 = tl.cdiv(N0, BLOCK_N)
        blocks1 = tl.cdiv(N1, BLOCK_N)
        if block >= blocks0 + blocks1:
            w_ptr = w2_ptr
            b_ptr = b2_ptr
            s_ptr = s2_ptr
            N = N2
            out_offset = N0 + N1
            block -= blocks0 + blocks1
        elif block >= blocks0:
            w_ptr = w1_ptr
            b_ptr = b1_ptr
            s_ptr = s1_ptr
            N = N1
            out_offset = N0
            block -= blocks0
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = n < N
    m = tl.arange(0, BLOCK_M)
    # A thread loads 16 bytes, so of 8-bit weights it has twice as many columns as of inputs, and
    # each tile of inputs would pass through shared memory to reach it. Loads of equal shapes get
    # equal columns, so a row alone is loaded once for each output, from the L1 cache.
    REPEATED: tl.constexpr = HAS_SCALE and BLOCK_M == 1
    rows = m
    if REPEATED:
        rows = tl.zeros((BLOCK_N,), tl.int32)
    SHARE: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    first = tl.program_id(1) * SHARE
    stop = tl.minimum(first + SHARE, K)
    k = first + tl.arange(0, BLOCK_K)
    tile = tl.where(is_output, n, 0).to(tl.int64)[:, None] * K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w = _weights(w_ptr + tile, k, K, BLOCK_K)
    w_up = w
    if GATED:
        w_up = _weights(w1_ptr + tile, k, K, BLOCK_K)
    ahead = (w,)
    ahead_up = (w_up,)
    if UNROLLED:
        for offset in tl.static_range(BLOCK_K, (AHEAD + 1) * BLOCK_K, BLOCK_K):
            ahead += (_weights(w_ptr + tile, k + offset, K, BLOCK_K),)  # type: ignore[assignment]
            if GATED:
                ahead_up += (_weights(w1_ptr + tile, k + offset, K, BLOCK_K),)  # type: ignore[assignment]
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_K if BLOCK_M == 1 else BLOCK_M), tl.float32)
    acc_up = acc
    squares = tl.zeros((BLOCK_N if REPEATED else BLOCK_M, BLOCK_K), tl.float32)
    x, squares = _inputs(x_ptr, norm_ptr, squares, rows, k, M, K, HAS_NORM, REPEATED)
    acc = _multiplied(acc, w, x, BLOCK_M)
    if GATED:
        acc_up = _multiplied(acc_up, w_up, x, BLOCK_M)
    if UNROLLED:
        for offset in tl.static_range(BLOCK_K, SHARE, BLOCK_K):
            k = first + offset + tl.arange(0, BLOCK_K)
            x, squares = _inputs(x_ptr, norm_ptr, squares, rows, k, M, K, HAS_NORM, REPEATED)
            if offset <= AHEAD * BLOCK_K:
                w = ahead[offset // BLOCK_K]
                w_up = ahead_up[offset // BLOCK_K] if GATED else w
            else:
                w = _weights(w_ptr + tile, k, K, BLOCK_K)
                w_up = _weights(w1_ptr + tile, k, K, BLOCK_K) if GATED else w
            acc = _multiplied(acc, w, x, BLOCK_M)
            if GATED:
                acc_up = _multiplied(acc_up, w_up, x, BLOCK_M)
    else:
        for offset in tl.range(first + BLOCK_K, stop, BLOCK_K, num_stages=STAGES):
            k = offset + tl.arange(0, BLOCK_K)
            x, squares = _inputs(x_ptr, norm_ptr, squares, rows, k, M, K, HAS_NORM, REPEATED)
            acc = _multiplied(acc, _weights(w_ptr + tile, k, K, BLOCK_K), x, BLOCK_M)
            if GATED:
                acc_up = _multiplied(acc_up, _weights(w1_ptr + tile, k, K, BLOCK_K), x, BLOCK_M)
    if BLOCK_M == 1:
        acc = tl.sum(acc, 1)[:, None]
        if GATED:
            acc_up = tl.sum(acc_up, 1)[:, None]
    square_sum = tl.sum(squares, 1)
    width = N0 if GATED else N0 + N1 + N2
    out = m[None, :] * width + (out_offset + n)[:, None]
    is_out = is_output[:, None] & (m < M)[None, :]
    is_last = True
    if SPLITS > 1:
        own = tl.program_id(1)
        tl.store(partial_ptr + own * M * width + out, acc, mask=is_out)
        squares_ptr = partial_ptr + SPLITS * M * width + tl.program_id(0) * SPLITS * BLOCK_M + m
        if HAS_NORM:
            tl.store(squares_ptr + own * BLOCK_M, square_sum)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived_ptr + tl.program_id(0), 1) == SPLITS - 1
        tl.debug_barrier()
        if is_last:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            square_sum = tl.zeros((BLOCK_M,), tl.float32)
            for i in tl.static_range(SPLITS):
                partial = partial_ptr + i * M * width + out
                acc += tl.load(partial, mask=is_out, other=0.0, cache_modifier=".cg")
                if HAS_NORM:
                    square_sum += tl.load(squares_ptr + i * BLOCK_M, cache_modifier=".cg")
            tl.store(arrived_ptr + tl.program_id(0), 0)
    if is_last:
        if HAS_NORM:
            rms = tl.rsqrt(square_sum / K + eps)
            rms = rms[:, None] if REPEATED else rms[None, :]
            acc *= rms
            if GATED:
                acc_up *= rms
        if HAS_SCALE:
            acc *= tl.load(s_ptr + n, mask=is_output, other=0.0).to(tl.float32)[:, None]
            if GATED:
                acc_up *= tl.load(s1_ptr + n, mask=is_output, other=0.0).to(tl.float32)[:, None]
        if HAS_BIAS:
            acc += tl.load(b_ptr + n, mask=is_output, other=0.0).to(tl.float32)[:, None]
            if GATED:
                acc_up += tl.load(b1_ptr + n, mask=is_output, other=0.0).to(tl.float32)[:, None]
        dtype = out_ptr.dtype.element_ty
        result = acc.to(dtype)
        if GATED:
            gate = _activated(result.to(tl.float32), ACTIVATION).to(dtype)
            result = (gate.to(tl.float32) * acc_up.to(dtype).to(tl.float32)).to(dtype)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + out, mask=is_out, other=0.0)
            result = (residual.to(tl.float32) + result.to(tl.float32)).to(dtype)
        tl.store(out_ptr + out, result, mask=is_out)


@triton.jit
def _weights(row_ptr, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load one tile of weights; it is read once, so the cache may evict it first."""
    if K % BLOCK_K == 0:
        tile = tl.load(row_ptr + k[None, :], eviction_policy="evict_first")
    else:
        tile = tl.load(row_ptr + k[None, :], mask=(k < K)[None, :], other=0.0)
    return tile


@triton.jit
def _inputs(
    x_ptr,
    norm_ptr,
    squares,
    m,
    k,
    M,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    REPEATED: tl.constexpr,
):
    """Load one tile of inputs times the norm's weight, and add up the squares of the inputs."""
    is_x = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=is_x, other=0.0)
    if HAS_NORM:
        wide = x.to(tl.float32)
        squares += wide * wide
        if REPEATED:
            offsets = m[:, None] * 0 + k[None, :]
            scale = tl.load(norm_ptr + offsets, mask=is_x, other=0.0).to(tl.float32)
        else:
            scale = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        x = (wide * scale).to(x.dtype)
    return x, squares


@triton.jit
def _multiplied(acc, w, x, BLOCK_M: tl.constexpr):
    """Add the product of a tile of weights and a tile of inputs."""
    if BLOCK_M == 1:
        acc += w.to(tl.float32) * x.to(tl.float32)
    else:
        acc = tl.dot(w.to(x.dtype), tl.trans(x), acc, input_precision="ieee")
    return acc


@triton.jit
def _activated(value, ACTIVATION: tl.constexpr):
    """Apply the activation of a gate in float32."""
    if ACTIVATION == "silu":
        result = value * tl.sigmoid(value)
    else:  # gelu by tanh: 0.5 (1 + tanh z) = sigmoid(2 z)
        z = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        result = value * tl.sigmoid(2.0 * z)
    return result
