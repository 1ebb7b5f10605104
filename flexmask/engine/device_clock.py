"""Times of what a device does, taken without waiting for it."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event


class DeviceClock:
    """Marks points in the work of a device; a CPU works while the host does."""

    def __init__(self, device: torch.device) -> None:
        """Measure on ``device``."""
        self._is_cuda = device.type == "cuda"

    def mark(self) -> Mark:
        """The point up to which work is queued."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Mark, second: Mark) -> float:
        """Time from one mark to another; waits for the second."""
        if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
            second.synchronize()
            return float(first.elapsed_time(second)) / 1e3
        assert isinstance(first, float)
        assert isinstance(second, float)
        return second - first
