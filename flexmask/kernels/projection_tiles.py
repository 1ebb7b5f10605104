"""Sizes of tiles for the kernels of `flexmask::project`.

They are those that were fastest on an H200 for the shapes of a Llama-3.2-3B in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch

from flexmask.kernels.launch import power_of_two

MANY_OUTPUTS = 1 << 16
"""From this many outputs on, as for a vocabulary, a program computes more outputs at once."""


def row_blocks(dtype: torch.dtype, width: int, is_gated: bool, has_norm: bool) -> dict[str, Any]:
    """Choose tiles for one row by the dtype of the weights.

    The columns of a row are unrolled, so wider ones take more registers. Beyond the widths here,
    registers would spill to memory.
    """
    if dtype == torch.int8:
        return _row_blocks(width, 2, 1024, 3, 2 if is_gated else 4)
    is_float8 = dtype == torch.float8_e4m3fn
    if is_gated:
        if is_float8 and width <= 4096:
            return _row_blocks(width, 4, 1024, 1, 2, registers=128)
        return _row_blocks(width, 2, 1024, 3, 2)
    if has_norm:
        if is_float8 and width <= 5120:
            return _row_blocks(width, 4, 256, 6, 1)
        if not is_float8 and width <= 3072:
            return _row_blocks(width, 2, 256, 6, 1, registers=96)
    elif width <= 4096:
        return _row_blocks(width, 2, 256, 6, 1, registers=128)
    return _row_blocks(width, 2, 1024, 1, 4)


def dense_blocks(
    rows: int, width: int, num_outputs: int, is_gated: bool, has_norm: bool
) -> dict[str, Any]:
    """Choose tiles for weights in the dtype of the inputs."""
    block_m = max(16, power_of_two(rows))
    if block_m == 16:
        if is_gated:
            return _blocks(16, 64, _dividing_block(width, 128), 1, 4, 8)
        if has_norm:
            return _blocks(16, 64, _dividing_block(width, 256), 1, 4, 4)
        splits = _splits(num_outputs, 32, programs=384)
        return _blocks(16, 32, _dividing_block(width, 256), splits, 4, 4)
    if num_outputs >= MANY_OUTPUTS:
        return _blocks(block_m, 128, _dividing_block(width, 128), 1, 3, 8)
    splits = 1 if is_gated or has_norm else _splits(num_outputs, 64, programs=96)
    return _blocks(block_m, 64, _dividing_block(width, 128), splits, 3 if is_gated else 4, 4)


def float8_blocks(width: int, num_outputs: int, is_gated: bool, has_norm: bool) -> dict[str, Any]:
    """Choose tiles for weights of float8, the same for any number of rows."""
    block_k = _dividing_block(width, 128)
    if is_gated or has_norm:
        return _blocks(64, 64, block_k, 1, 4, 4)
    return _blocks(64, 32, block_k, _splits(num_outputs, 32, programs=384), 3, 4)


def digit_blocks(rows: int, width: int, num_outputs: int, is_gated: bool) -> dict[str, Any]:
    """Choose tiles for weights of int8 and digits of inputs."""
    block_m = max(4, power_of_two(rows))
    if block_m <= 16:
        splits = 1 if is_gated else _splits(num_outputs, 64, programs=384)
        blocks = _blocks(block_m, 64, _dividing_block(width, 256), splits, 3, 4)
    elif is_gated:
        blocks = _blocks(block_m, 64, _dividing_block(width, 128), 1, 4, 8)
    else:
        splits = _splits(num_outputs, 64, programs=96)
        blocks = _blocks(block_m, 64, _dividing_block(width, 128), splits, 3, 4)
    return blocks | {"HAS_DIGITS": True}


def fit_tiles(blocks: dict[str, Any], is_gated: bool, item_bytes: int, limit: int) -> None:
    """Shrink tiles that go through shared memory until they fit into ``limit`` bytes."""
    rows = blocks["BLOCK_M"] * (4 if blocks["HAS_DIGITS"] else 1)
    rows += blocks["BLOCK_N"] * (2 if is_gated else 1)
    while rows * blocks["BLOCK_K"] * item_bytes * blocks["STAGES"] > limit:
        if blocks["BLOCK_K"] > 64 or blocks["STAGES"] <= 2:
            blocks["BLOCK_K"] //= 2
        else:
            blocks["STAGES"] -= 1


def _blocks(m: int, n: int, k: int, splits: int, stages: int, warps: int) -> dict[str, Any]:
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return sizes | {"SPLITS": splits, "STAGES": stages, "num_warps": warps, "HAS_DIGITS": False}


def _row_blocks(
    width: int, n: int, k: int, ahead: int, warps: int, registers: int | None = None
) -> dict[str, Any]:
    block_k = _dividing_block(width, k)
    sizes = {"BLOCK_N": n, "BLOCK_K": block_k, "THREAD_K": max(1, block_k // (32 * warps))}
    # With fewer registers more programs run at once, and all of a launch end together.
    limit = {} if registers is None else {"maxnreg": registers}
    return sizes | {"AHEAD": min(ahead, -(-width // block_k)), "num_warps": warps} | limit


def _dividing_block(width: int, wanted: int) -> int:
    """Return a power of two up to ``wanted``; it divides ``width`` unless it would be small."""
    divisor = min(wanted, width & -width)
    return divisor if divisor >= 128 else max(16, min(wanted, power_of_two(width)))


def _splits(num_outputs: int, block_n: int, programs: int) -> int:
    """Choose the shares of the columns, one to four, for about ``programs`` programs."""
    return min(4, max(1, programs // -(-num_outputs // block_n)))
