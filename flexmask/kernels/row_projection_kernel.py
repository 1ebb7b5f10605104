"""The Triton kernel of `flexmask::project` for one row: matrix-vector products."""

from __future__ import annotations

import triton
import triton.language as tl

from flexmask.kernels.projection_outputs import finished, load_weights, weight_of


@triton.jit
def row_projection_kernel(
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    THREAD_K: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute ``BLOCK_N`` outputs; a thread has the same columns of every weight's row.

    A tile is ``BLOCK_K`` columns of one row of weights, of which a thread has ``THREAD_K`` and
    keeps one sum. Tiles of inputs and of weights lie alike in registers, whatever their dtypes,
    so each input is converted once for all outputs. With ``PDL`` a program may start while the
    kernel before it still runs: it reads ``AHEAD`` tiles of each row of weights, which no kernel
    writes, before it waits for that kernel.
    """
    GATED: tl.constexpr = ACTIVATION != ""
    TILES: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    w_ptr, b_ptr, s_ptr, N, before, first = weight_of(
        tl.program_id(0), w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, s0_ptr, s1_ptr, s2_ptr,
        N0, N1, N2, BLOCK_N, GATED,
    )  # fmt: skip
    k = tl.arange(0, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    ahead = ()
    for t in tl.static_range(AHEAD):
        ahead += _tiles(w_ptr, w1_ptr, first, N, k + t * BLOCK_K, K, BLOCK_N, BLOCK_K, GATED)
    if PDL:
        tl.extra.cuda.gdc_wait()
    squares = tl.zeros((BLOCK_K // THREAD_K,), tl.float32)
    sums = ()
    for _ in tl.static_range(TILES):
        sums += (squares,)  # type: ignore[assignment]
    for t in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        columns = k + t * BLOCK_K
        if t < AHEAD:
            tiles = ()
            for i in tl.static_range(TILES):
                tiles += (ahead[t * TILES + i],)  # type: ignore[assignment]
        else:
            tiles = _tiles(w_ptr, w1_ptr, first, N, columns, K, BLOCK_N, BLOCK_K, GATED)
        x = tl.load(x_ptr + columns, mask=columns < K, other=0.0)
        wide = x.to(tl.float32)
        if HAS_NORM:
            squares += _sum_of_threads(wide * wide, THREAD_K)
            norm = tl.load(norm_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
            wide = (wide * norm).to(x.dtype).to(tl.float32)
        more = ()
        for i in tl.static_range(TILES):
            more += (sums[i] + _sum_of_threads(tiles[i].to(tl.float32) * wide, THREAD_K),)  # type: ignore[assignment]
        sums = more
    rms = 1.0
    if HAS_NORM:
        rms = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    for i in tl.static_range(BLOCK_N):
        n = first + i
        up = 0.0
        if GATED:
            up = tl.sum(sums[BLOCK_N + i], 0) * rms
        result = finished(
            tl.sum(sums[i], 0) * rms, up, b_ptr, b1_ptr, s_ptr, s1_ptr, residual_ptr, n, n < N,
            before + n, n < N, out_ptr.dtype.element_ty, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL,
            ACTIVATION,
        )  # fmt: skip
        tl.store(out_ptr + before + n, result, mask=n < N)


@triton.jit
def _sum_of_threads(products, THREAD_K: tl.constexpr):
    """Sum each ``THREAD_K`` neighbours, which one thread has."""
    return tl.sum(tl.reshape(products, (products.shape[0] // THREAD_K, THREAD_K)), 1)


@triton.jit
def _tiles(
    w_ptr,
    w1_ptr,
    first,
    N,
    columns,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
):
    """Load columns of ``BLOCK_N`` rows of a weight, and of as many of its gated partner."""
    tiles = ()
    for i in tl.static_range(2 * BLOCK_N if GATED else BLOCK_N):
        ptr = w_ptr if i < BLOCK_N else w1_ptr
        row = tl.minimum(first + i % BLOCK_N, N - 1).to(tl.int64)
        tiles += (load_weights(ptr + row * K, columns, K, BLOCK_K),)  # type: ignore[assignment]
    return tiles
