"""Parts of both Triton kernels of `flexmask::project`: reading a weight, and the last steps."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight_of(
    block,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    s0_ptr,
    s1_ptr,
    s2_ptr,
    N0,
    N1,
    N2,
    BLOCK_N: tl.constexpr,
    GATED: tl.constexpr,
):
    """Return the weight, bias and scale of a block of outputs, and how the block lies in them.

    The last three are the weight's number of outputs, the number of outputs of the weights before
    it, and the block's first output. A gated pair has the blocks of its first weight.
    """
    w_ptr = w0_ptr
    b_ptr = b0_ptr
    s_ptr = s0_ptr
    N = N0
    before = 0
    if not GATED:
        blocks0 = tl.cdiv(N0, BLOCK_N)
        blocks1 = tl.cdiv(N1, BLOCK_N)
        if block >= blocks0 + blocks1:
            w_ptr = w2_ptr
            b_ptr = b2_ptr
            s_ptr = s2_ptr
            N = N2
            before = N0 + N1
            block -= blocks0 + blocks1
        elif block >= blocks0:
            w_ptr = w1_ptr
            b_ptr = b1_ptr
            s_ptr = s1_ptr
            N = N1
            before = N0
            block -= blocks0
    return w_ptr, b_ptr, s_ptr, N, before, block * BLOCK_N


@triton.jit
def load_weights(row_ptr, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load columns ``k`` of rows of weights; they are read once, so the cache may evict them."""
    if K % BLOCK_K == 0:
        tile = tl.load(row_ptr + k, eviction_policy="evict_first")
    else:
        tile = tl.load(row_ptr + k, mask=k < K, other=0.0)
    return tile


@triton.jit
def finished(
    value,
    up,
    b_ptr,
    b1_ptr,
    s_ptr,
    s1_ptr,
    residual_ptr,
    n,
    is_output,
    out,
    is_out,
    dtype: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Scale sums once, add biases, gate, add a residual, and round to ``dtype`` after each."""
    GATED: tl.constexpr = ACTIVATION != ""
    if HAS_SCALE:
        value *= tl.load(s_ptr + n, mask=is_output, other=0.0).to(tl.float32)
        if GATED:
            up *= tl.load(s1_ptr + n, mask=is_output, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(b_ptr + n, mask=is_output, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(b1_ptr + n, mask=is_output, other=0.0).to(tl.float32)
    result = value.to(dtype)
    if GATED:
        gate = _activated(result.to(tl.float32), ACTIVATION).to(dtype)
        result = (gate.to(tl.float32) * up.to(dtype).to(tl.float32)).to(dtype)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + out, mask=is_out, other=0.0)
        result = (residual.to(tl.float32) + result.to(tl.float32)).to(dtype)
    return result


@triton.jit
def _activated(value, ACTIVATION: tl.constexpr):
    """Apply the activation of a gate in float32."""
    if ACTIVATION == "silu":
        result = value * tl.sigmoid(value)
    else:  # gelu by tanh: 0.5 (1 + tanh z) = sigmoid(2 z)
        z = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        result = value * tl.sigmoid(2.0 * z)
    return result
