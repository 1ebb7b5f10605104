"""Products of a few rows with weights on a CPU, in the order of operands that is faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDEST = 2048
"""Widest rows for which multiplying the weight by columns is faster."""

FEW_ROWS = 4
"""Most rows for which weight times columns is faster."""
MANY_OUTPUTS = 1 << 13
"""From this many outputs on, as for a vocabulary, it is faster for up to 32 rows."""


def linear_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `torch.nn.functional.linear`, as weight times columns where that is faster.

    In float32, MKL multiplies a matrix by two to four columns at the speed of memory, but one row
    by the matrix at a third of it (torch 2.11 and 2.13, two cores of an AMD EPYC).

    Args:
        x: ``(..., K)``.
        weight: ``(N, K)``.
        bias: ``(N,)``.

    Returns:
        ``(..., N)``.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if not weight_comes_first(count, weight.shape[0], weight.shape[1], x.dtype):
        return nn.functional.linear(x, weight, bias)
    # A single column would be a matrix-vector product, which is as slow as one row.
    columns = rows.t() if count > 1 else torch.cat((rows, rows)).t()
    result = torch.mm(weight, columns)[:, :count].t().contiguous().view(*x.shape[:-1], -1)
    return result if bias is None else result + bias


def weight_comes_first(rows: int, outputs: int, width: int, dtype: torch.dtype) -> bool:
    """Return whether weight times columns is faster than rows times weight."""
    most = 32 if outputs >= MANY_OUTPUTS else FEW_ROWS
    return dtype == torch.float32 and rows <= most and width <= WIDEST


_LIBRARY = torch.library.Library("flexmask", "FRAGMENT")
_LIBRARY.define("kept_apart(Tensor x) -> Tensor")


@torch.library.impl(_LIBRARY, "kept_apart", "CPU")
def _kept_apart(x: Tensor) -> Tensor:
    """Copy a tensor in an operation that inductor does not fuse with the one before it.

    Inductor's C++ kernel of FlexAttention fails if it is fused with what follows, such as the
    transposition of its output for `linear_of_few_rows` (torch 2.13).
    """
    return x.clone(memory_format=torch.contiguous_format)


def _fake_kept_apart(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


torch.library.register_fake("flexmask::kept_apart", _fake_kept_apart, lib=_LIBRARY)

kept_apart = torch.ops.flexmask.kept_apart
"""The operator; `_kept_apart` documents it."""
