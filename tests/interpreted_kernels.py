"""Kernels of the decode step, launched on a CPU as on a GPU, against their plain twins.

`start` makes a process one that interprets kernels. The functions raise what is wrong, and return
the constants that the launch chose.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flexmask.kernels import decode_attention, projection

# Checks replace parts of these modules.
DECODE_ATTENTION: Any = decode_attention
PROJECTION: Any = projection

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def start() -> None:
    """Let triton interpret kernels in this process, which must not have imported it yet."""
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("error", RuntimeWarning)  # NaN out of numbers, among others
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # what is read before it is written is NaN

    import triton_interpreter
    from flexmask.kernels.decode_attention_kernel import (
        decode_attention_kernel,
        shared_keys_kernel,
    )
    from flexmask.kernels.projection_kernel import input_digits_kernel, projection_kernel
    from flexmask.kernels.row_projection_kernel import row_projection_kernel

    straying = triton_interpreter.straying_kernel
    for kernel in (
        decode_attention_kernel,
        shared_keys_kernel,
        input_digits_kernel,
        projection_kernel,
        row_projection_kernel,
        straying,
    ):
        triton_interpreter.watch(kernel)
    for module in (DECODE_ATTENTION, PROJECTION):
        module.starts_early = lambda device: False  # that part is assembly


def run(check: Callable[..., Any], **case: Any) -> Any:
    """Run a check; what a kernel raises comes without what triton wraps around it."""
    DECODE_ATTENTION.arrival_counters.cache_clear()  # what fails may leave them anywhere
    torch.manual_seed(0)
    try:
        return check(**case)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None


def stray(access: str) -> None:
    """Access two elements of a view, and two places that lie between its rows."""
    from triton_interpreter import straying_kernel

    straying_kernel[(1,)](torch.zeros(2, 4, dtype=torch.int32)[:, :2], ACCESS=access)


def check_decode_attention(
    slots: Sequence[int],
    capacity: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    softcap: float = 0.0,
    is_rotated: bool = True,
    is_transposed: bool = False,
    sharing: Sequence[tuple[int, int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
    tile_bytes: int = 200_000,
) -> dict[str, Any]:
    """Check a step of rows at ``slots``: ``heads`` of query and key, ``dims`` of key and value.

    With ``sharing``, keys lie where a `KeyTable` says.
    """
    rows, (query_heads, kv_heads), (key_dim, value_dim) = len(slots), heads, dims
    sizes = [query_heads * key_dim, kv_heads * key_dim, kv_heads * value_dim]
    parts = torch.randn(rows, sum(sizes), dtype=dtype).split(sizes, -1)
    own = [part.view(rows, -1, dim) for part, dim in zip(parts, (key_dim, *dims), strict=True)]
    if is_transposed:
        own = [part.mT.contiguous().mT for part in own]
    angles = [torch.randn(rows, key_dim, dtype=dtype) if is_rotated else None for _ in range(2)]
    places = (torch.tensor(slots), key_dim**-0.5, softcap, *_table(slots, capacity, sharing))
    plain = [torch.randn(kv_heads, rows, capacity, dim, dtype=dtype) for dim in dims]
    caches = [cache.clone() for cache in plain]
    want = DECODE_ATTENTION.plain_decode_attention(*own, *angles, *plain, *places)
    for row, slot in enumerate(slots):
        for cache, filled in zip(caches, plain, strict=True):
            cache[:, row, slot:] = float("nan")  # what lies there is unread
            filled[:, row, slot + 1 :] = float("nan")  # and stays as it is

    def launch() -> tuple[Tensor, ...]:
        kept = [cache.clone() for cache in caches]
        return DECODE_ATTENTION._fast_decode_attention(*own, *angles, *kept, *places), *kept

    DECODE_ATTENTION.tile_bytes = lambda device: tile_bytes
    for got in _in_both_orders(launch):
        for name, *both in zip(("output", "keys", "values"), got, (want, *plain), strict=True):
            _assert_close(name, *both)
    return _constants()


def _table(
    slots: Sequence[int], capacity: int, sharing: Sequence[tuple[int, int, int]] | None
) -> tuple[Tensor | None, Tensor | None]:
    """A table of slots in any order, all below the row's own; beyond, what must not be read."""
    if sharing is None:
        return None, None
    key_slots = torch.full((len(slots), capacity), 1 << 30, dtype=torch.int32)
    for row, (slot, (source, num_shared, copies)) in enumerate(zip(slots, sharing, strict=True)):
        num_keys = slot - max(copies - 1, 0) * num_shared
        key_slots[row, :num_keys] = torch.randperm(slot)[:num_keys]
        of_all = torch.Generator().manual_seed(source)
        key_slots[row, :num_shared] = torch.randperm(slots[source], generator=of_all)[:num_shared]
    return key_slots, torch.tensor(sharing, dtype=torch.int32)


def check_projection(
    rows: int,
    width: int,
    sizes: Sequence[int],
    activation: str = "",
    has_bias: bool = False,
    has_norm: bool = False,
    has_residual: bool = False,
    weight_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    tile_bytes: int = 200_000,
) -> dict[str, Any]:
    """Check the product of ``rows`` inputs of a width with weights for as many outputs each.

    Weights of a ``weight_dtype`` have a scale for each output.
    """
    outputs = sizes[0] if activation else sum(sizes)
    weights = [torch.randn(size, width) / width**0.5 for size in sizes]
    scales = [weight.abs().amax(1, keepdim=True) / 100 for weight in weights]
    if weight_dtype is None:
        weights, scales = [weight.to(dtype) for weight in weights], []
    else:
        scaled = zip(weights, scales, strict=True)
        weights = [(weight / scale).round().to(weight_dtype) for weight, scale in scaled]
    arguments = (
        torch.randn(rows, width, dtype=dtype),
        weights,
        [torch.randn(size, dtype=dtype) for size in sizes] if has_bias else [],
        scales,
        torch.randn(width, dtype=dtype) if has_norm else None,
        1e-5,
        activation,
        torch.randn(rows, outputs, dtype=dtype) if has_residual else None,
    )
    want = projection.project(*arguments)
    PROJECTION.tile_bytes = lambda device: tile_bytes
    for got in _in_both_orders(lambda: projection._fast_project(*arguments)):
        _assert_close("output", got, want)
    return _constants()


def _in_both_orders(launch: Callable[[], Any]) -> Iterator[Any]:
    """Launch with programs in order, then from the last to the first."""
    import triton_interpreter

    for backwards in (False, True):
        triton_interpreter.CheckingBuilder.backwards = backwards
        yield launch()
        if (counters := triton_interpreter.last_launch.get("arrived_ptr")) is not None:
            assert not counters.any(), f"counters are left at {counters.tolist()}"


def _assert_close(name: str, got: Tensor, want: Tensor) -> None:
    within = TOLERANCE[want.dtype]
    torch.testing.assert_close(
        got, want, rtol=within, atol=within, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def _constants() -> dict[str, Any]:
    from triton_interpreter import last_launch

    return {name: value for name, value in last_launch.items() if name.isupper()}
