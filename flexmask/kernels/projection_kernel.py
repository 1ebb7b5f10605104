"""The Triton kernel of `flexmask::project` for a few rows, which share tiles of weights."""

from __future__ import annotations

import triton
import triton.language as tl

from flexmask.kernels.projection_outputs import finished, load_weights, weight_of


@triton.jit
def projection_kernel(
    x_ptr,
    x_scale_ptr,
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
    HAS_DIGITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute ``BLOCK_N`` outputs of every row from one share of the columns, on tensor cores.

    Where there are several shares (``SPLITS``; none may be empty), the last program to arrive
    joins them, always in the same order. With ``PDL`` a program may start while the kernel before
    it still runs: it reads its first tile of weights, which no kernel writes, before it waits for
    that kernel. With ``HAS_SCALE`` weights are of 8 bits, and each output is scaled once: float8
    is converted in registers; int8 is multiplied as it is with the digits of inputs that
    `input_digits_kernel` writes (``HAS_DIGITS``), and the sums, exact in int32, are joined.
    """
    GATED: tl.constexpr = ACTIVATION != ""
    w_ptr, b_ptr, s_ptr, N, before, start = weight_of(
        tl.program_id(0), w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, s0_ptr, s1_ptr, s2_ptr,
        N0, N1, N2, BLOCK_N, GATED,
    )  # fmt: skip
    n = start + tl.arange(0, BLOCK_N)
    is_output = n < N
    m = tl.arange(0, BLOCK_M)
    column = m
    is_column = m < M
    if HAS_DIGITS:
        column = tl.arange(0, 4 * BLOCK_M)
        is_column = (column < 4 * M) & (column % 4 < 3)
    SHARE: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    first = tl.program_id(1) * SHARE
    stop = tl.minimum(first + SHARE, K)
    k = first + tl.arange(0, BLOCK_K)
    row = tl.where(is_output, n, 0).to(tl.int64)[:, None] * K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w = load_weights(w_ptr + row, k[None, :], K, BLOCK_K)
    w_up = w
    if GATED:
        w_up = load_weights(w1_ptr + row, k[None, :], K, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
    WEIGHTS_SECOND: tl.constexpr = HAS_SCALE and not HAS_DIGITS
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if WEIGHTS_SECOND:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_DIGITS:
        acc = tl.zeros((BLOCK_N, 4 * BLOCK_M), tl.int32)
    acc_up = acc
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    x, squares = _inputs(x_ptr, norm_ptr, squares, column, is_column, k, K, HAS_NORM)
    acc = _multiplied(acc, w, x, WEIGHTS_SECOND)
    if GATED:
        acc_up = _multiplied(acc_up, w_up, x, WEIGHTS_SECOND)
    for offset in tl.range(first + BLOCK_K, stop, BLOCK_K, num_stages=STAGES):
        k = offset + tl.arange(0, BLOCK_K)
        x, squares = _inputs(x_ptr, norm_ptr, squares, column, is_column, k, K, HAS_NORM)
        acc = _multiplied(
            acc, load_weights(w_ptr + row, k[None, :], K, BLOCK_K), x, WEIGHTS_SECOND
        )
        if GATED:
            w_up = load_weights(w1_ptr + row, k[None, :], K, BLOCK_K)
            acc_up = _multiplied(acc_up, w_up, x, WEIGHTS_SECOND)
    if WEIGHTS_SECOND:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    if HAS_DIGITS:
        step = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
        acc = _joined_digits(acc, step, BLOCK_M, BLOCK_N)
        if GATED:
            acc_up = _joined_digits(acc_up, step, BLOCK_M, BLOCK_N)
    square_sum = tl.sum(squares, 1)
    width = N0 if GATED else N0 + N1 + N2
    out = m[None, :] * width + (before + n)[:, None]
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
            rms = tl.rsqrt(square_sum / K + eps)[None, :]
            acc *= rms
            if GATED:
                acc_up *= rms
        result = finished(
            acc, acc_up, b_ptr, b1_ptr, s_ptr, s1_ptr, residual_ptr, n[:, None],
            is_output[:, None], out, is_out, out_ptr.dtype.element_ty, HAS_BIAS, HAS_SCALE,
            HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
        tl.store(out_ptr + out, result, mask=is_out)


@triton.jit
def _inputs(x_ptr, norm_ptr, squares, row, is_row, k, K: tl.constexpr, HAS_NORM: tl.constexpr):
    """Load one tile of inputs times the norm's weight, and add up the squares of the inputs."""
    is_x = is_row[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=is_x, other=0.0)
    if HAS_NORM:
        wide = x.to(tl.float32)
        squares += wide * wide
        scale = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        x = (wide * scale[None, :]).to(x.dtype)
    return x, squares


@triton.jit
def _multiplied(acc, w, x, WEIGHTS_SECOND: tl.constexpr):
    """Add the product of a tile of weights and a tile of inputs.

    The second operand goes through shared memory. Weights of float8 are that one: converted
    before, they are written there 16 bytes at a time. As the first they would be read from there
    byte by byte and converted after (triton 3.6).
    """
    if WEIGHTS_SECOND:
        wide = w.to(tl.float32).to(x.dtype)
        acc = tl.dot(x, tl.trans(wide), acc, input_precision="ieee")
    elif acc.dtype == tl.int32:
        acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    return acc


@triton.jit
def _joined_digits(acc, step, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the products ``(BLOCK_N, BLOCK_M)`` of those of the inputs' digits."""
    digit = tl.arange(0, 4)
    value = tl.where(digit == 0, 1.0, tl.where(digit == 1, 256.0, 65536.0))
    value = tl.where(digit == 3, 0.0, value)
    of_digits = tl.reshape(acc.to(tl.float32), (BLOCK_N, BLOCK_M, 4))
    return tl.sum(of_digits * value[None, None, :], 2) * step[None, :]


@triton.jit
def input_digits_kernel(
    x_ptr,
    norm_ptr,
    digits_ptr,
    scale_ptr,
    eps,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write a row of inputs as whole multiples of a step, and these as three digits of int8 each.

    The step is 2**-23 of the largest input, or a little more, so that nothing is lost that
    products in float32 would keep. Digit ``i`` of input ``k``, of which the place is worth
    256**i, is at ``(4 row + i, k)``. With ``HAS_NORM`` inputs are divided by their root mean
    square and multiplied by the norm's weight before.

    Example:
        5.0, -2.5, 0.001 have the step 5 / 8323072 and the multiples 8323072, -4161536, 1665.
        1665 = 0 * 65536 + 7 * 256 - 127.
    """
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    is_x = k < K
    norm = 1.0
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if HAS_NORM:
        norm = tl.load(norm_ptr + k, mask=is_x, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * K + k, mask=is_x, other=0.0)
    value = x.to(tl.float32)
    if HAS_NORM:
        value *= tl.rsqrt(tl.sum(value * value, 0) / K + eps)
        value = (value.to(x.dtype).to(tl.float32) * norm).to(x.dtype).to(tl.float32)
    # Infinity and NaN, which a maximum may pass over, end up in the step, and so in all outputs.
    largest = tl.max(tl.abs(value), 0) + 0.0 * tl.sum(value, 0)
    step = tl.where(largest == 0.0, 1.0, largest / 8323072.0)  # 127 * 65536
    # 128 in each place makes all digits positive, and is taken off again.
    multiple = tl.floor(value / step + 0.5).to(tl.int32) + 0x808080
    for i in tl.static_range(3):
        digit = ((multiple >> (8 * i)) & 255) - 128
        tl.store(digits_ptr + (4 * row + i) * K + k, digit.to(tl.int8), mask=is_x)
    tl.store(scale_ptr + row, step)
