"""Facts about sizes and devices for launches of the decode step's kernels."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


FUSED_FLOATS = {"enable_fp_fusion": True}
"""The option of a launch by which products and sums become one instruction, as Triton did by
default up to 3.9, which says that 3.10 will not."""


@cache
def tile_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a program's tiles may take: seven eighths of the device's."""
    properties = torch.cuda.get_device_properties(device)
    default = properties.shared_memory_per_block
    available: int = getattr(properties, "shared_memory_per_block_optin", default)
    return available * 7 // 8


@cache
def starts_early(device: torch.device) -> bool:
    """Return whether kernels can start while the one before still runs: on Hopper and later."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def arrival_counters(device: torch.device, count: int) -> Tensor:
    """Return counters ``(count,)`` of programs that have finished their share.

    They are zero between launches, because the last program to arrive resets its counter. Launches
    on one stream share them.
    """
    return torch.zeros(count, dtype=torch.int32, device=device)
