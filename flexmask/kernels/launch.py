"""What launching a kernel of the decode step needs to know of sizes and devices."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


@cache
def tile_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a program's tiles may take: seven eighths of what there is."""
    properties = torch.cuda.get_device_properties(device)
    default = properties.shared_memory_per_block
    available: int = getattr(properties, "shared_memory_per_block_optin", default)
    return available * 7 // 8


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel can start while the one before it still runs: on Hopper and later."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def arrival_counters(device: torch.device, count: int) -> Tensor:
    """Counters ``(count,)`` of the programs that have done their share, zero between launches.

    The last program to arrive sets its counter back. Launches on one stream share them.
    """
    return torch.zeros(count, dtype=torch.int32, device=device)
