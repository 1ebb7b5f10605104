"""A clock for the work of a device, read without waiting for the device."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event


class DeviceClock:
    """Marks points in the work of a device: CUDA events, or the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Make a clock for ``device``."""
        self._is_cuda = device.type == "cuda"

    def mark(self) -> Mark:
        """Mark the end of the work that is queued so far."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Mark, second: Mark) -> float:
        """Return the seconds from one mark to another; waits for the second."""
        if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
            second.synchronize()
            return float(first.elapsed_time(second)) / 1e3
        assert isinstance(first, float)
        assert isinstance(second, float)
        return second - first
