"""The operator ``flexmask::project``: products of few rows with weights, fused with their norm.

A decode step reads every weight once, so each kernel that reads weights slower than memory allows,
or that starts late, costs time. One launch here replaces the norm before a projection, all
projections of the same input, and the gate or the residual sum after them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flexmask.kernels.launch import (
    FUSED_FLOATS,
    arrival_counters,
    power_of_two,
    starts_early,
    tile_bytes,
)
from flexmask.kernels.projection_tiles import (
    dense_blocks,
    digit_blocks,
    fit_tiles,
    float8_blocks,
    row_blocks,
)

MAX_ROWS = 64
"""Most rows; more are a matrix product like any other."""

ACTIVATIONS = ("", "silu", "gelu_tanh")


@torch.library.custom_op("flexmask::project", mutates_args=(), device_types="cpu")
def project(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[Tensor],
    norm_weight: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """Multiply rows with one to three weights; the reference, which runs on a CPU.

    Args:
        x: ``(..., K)``.
        weights: ``(N_i, K)`` each, of the dtype of ``x``, or int8 or float8 with ``scales``.
        biases: ``(N_i,)`` each, or an empty list.
        scales: ``(N_i, 1)`` each, by which outputs are multiplied; an empty list for none.
        norm_weight: ``(K,)``; if given, ``x`` is first divided by its root mean square and
            multiplied by this.
        eps: Added to the mean square.
        activation: ``silu`` or ``gelu_tanh`` of the first product times the second; empty for
            the products side by side.
        residual: ``(..., N)``, added to the result.

    Returns:
        ``(..., N)``: the products side by side, or the gated product of two.
    """
    if norm_weight is not None:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        x = norm_weight * wide.to(x.dtype)
    products = [
        _product(x, weight, biases[i] if biases else None, scales[i] if scales else None)
        for i, weight in enumerate(weights)
    ]
    if activation == "silu":
        result = nn.functional.silu(products[0]) * products[1]
    elif activation == "gelu_tanh":
        result = nn.functional.gelu(products[0], approximate="tanh") * products[1]
    else:
        result = torch.cat(products, -1)
    return result if residual is None else residual + result


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    if scale is None:
        return nn.functional.linear(x, weight, bias)
    result = nn.functional.linear(x.float(), weight.float()) * scale[:, 0].float()
    return (result if bias is None else result + bias.float()).to(x.dtype)


@project.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[Tensor],
    norm_weight: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    sizes = [weight.shape[0] for weight in weights]
    return x.new_empty(*x.shape[:-1], sizes[0] if activation else sum(sizes))


@project.register_kernel("cuda")
def _fast_project(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[Tensor],
    norm_weight: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    sizes = [weight.shape[0] for weight in weights]
    outputs = sizes[:1] if activation else sizes
    out = x.new_empty(*x.shape[:-1], sum(outputs))
    has_digits = weights[0].dtype == torch.int8 and rows > 1
    inputs = _input_digits(x, norm_weight, eps) if has_digits else (x, x)
    has_norm = norm_weight is not None and not has_digits
    has_pdl = starts_early(x.device)
    others = (
        x if norm_weight is None else norm_weight,
        *_three(weights),
        *_three(biases or weights),
        *_three(scales or weights),
        x if residual is None else residual.contiguous(),
        out,
    )
    numbers = (*([*sizes, 0, 0])[:3], eps)
    constants = {
        "K": width,
        "HAS_NORM": has_norm,
        "HAS_BIAS": bool(biases),
        "HAS_SCALE": bool(scales),
        "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": activation,
        "PDL": has_pdl,
        "launch_pdl": has_pdl,
        **FUSED_FLOATS,
    }
    if rows == 1:
        from flexmask.kernels.row_projection_kernel import row_projection_kernel

        blocks = row_blocks(weights[0].dtype, width, activation != "", has_norm)
        grid = (_num_blocks(outputs, blocks),)
        row_projection_kernel[grid](x, *others, *numbers, **constants, **blocks)
        return out
    from flexmask.kernels.projection_kernel import projection_kernel

    shape = (width, sum(outputs), activation != "")
    if has_digits:
        blocks = digit_blocks(rows, *shape)
    elif scales:
        blocks = float8_blocks(*shape, has_norm)
    else:
        blocks = dense_blocks(rows, *shape, has_norm)
    fit_tiles(blocks, activation != "", inputs[0].element_size(), tile_bytes(x.device))
    splits = blocks["SPLITS"] = _none_empty(blocks["SPLITS"], -(-width // blocks["BLOCK_K"]))
    num_blocks = _num_blocks(outputs, blocks)
    shares = splits * (rows * sum(outputs) + num_blocks * blocks["BLOCK_M"]) if splits > 1 else 1
    partial = torch.empty(shares, dtype=torch.float32, device=x.device)
    arrived = arrival_counters(x.device, num_blocks)
    projection_kernel[num_blocks, splits](
        *inputs, *others, partial, arrived, rows, *numbers, **constants, **blocks
    )
    return out


def _input_digits(x: Tensor, norm_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return digits ``(rows, 4, K)`` of inputs, of which the fourth is unused, and their steps."""
    from flexmask.kernels.projection_kernel import input_digits_kernel

    width = x.shape[-1]
    rows = x.numel() // width
    digits = torch.empty(rows, 4, width, dtype=torch.int8, device=x.device)
    steps = torch.empty(rows, dtype=torch.float32, device=x.device)
    has_pdl = starts_early(x.device)
    input_digits_kernel[(rows,)](
        x,
        x if norm_weight is None else norm_weight,
        digits,
        steps,
        eps,
        K=width,
        HAS_NORM=norm_weight is not None,
        BLOCK_K=power_of_two(width),
        PDL=has_pdl,
        launch_pdl=has_pdl,
        **FUSED_FLOATS,
        num_warps=8 if width <= 8192 else 16,
    )
    return digits, steps


def most_rows_with_norm(dtype: torch.dtype) -> int:
    """Return the most rows for which a norm before weights of ``dtype`` costs nothing.

    For more rows a norm of its own is cheaper: fused, it keeps the inputs from the tensor cores'
    direct path through shared memory, and tiles for float8 have 64 rows of inputs. With int8 the
    norm is part of another kernel in any case.
    """
    most = {torch.int8: MAX_ROWS, torch.float8_e4m3fn: 1}
    return most.get(dtype, 16)


def _num_blocks(outputs: Sequence[int], blocks: Mapping[str, int]) -> int:
    """Return the number of programs for as many outputs of each weight."""
    return sum(-(-size // blocks["BLOCK_N"]) for size in outputs)


def _none_empty(splits: int, num_blocks: int) -> int:
    """Reduce the number of shares until, at equal size, none of them is empty."""
    share = -(-num_blocks // splits)
    return -(-num_blocks // share)


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fill up to three tensors with the first, which the kernel does not read there."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]
