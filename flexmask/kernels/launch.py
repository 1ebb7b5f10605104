"""What launching a kernel of the decode step needs to know of sizes and devices."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SHARED_MEMORY_BYTES = 200_000
"""Of 227 KiB that a program may have on Hopper, what tiles may take."""


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


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
