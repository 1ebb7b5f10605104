"""Times of work on a device: between two points of its queue, and of a repeated call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

WARM_UPS = 2
CALLS_PER_GRAPH = 4

Mark = float | torch.cuda.Event
"""A point in the work of a device, from `DeviceClock.mark`."""


class DeviceClock:
    """Marks points in the work of a device: CUDA events, or the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Make a clock for ``device``."""
        self._is_cuda = device.type == "cuda"

    def mark(self) -> Mark:
        """Mark the end of the work that is queued so far, without waiting for it."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_passed(self, mark: Mark) -> bool:
        """Return True if the work before a mark is done, without waiting for it."""
        return not isinstance(mark, torch.cuda.Event) or mark.query()

    def seconds(self, first: Mark, second: Mark) -> float:
        """Return the seconds from one mark to another; waits for the second."""
        if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
            second.synchronize()
            return float(first.elapsed_time(second)) / 1e3
        assert isinstance(first, float)
        assert isinstance(second, float)
        return second - first


@dataclass(frozen=True)
class Spread:
    """Milliseconds of a call.

    Attributes:
        median: The median.
        low: The first quartile.
        high: The third.
    """

    median: float
    low: float
    high: float


def time_call(call: Callable[[], object], device: torch.device, repeats: int = 20) -> Spread:
    """Time a call after warm-up; on a GPU as a CUDA graph, without the cost of launches.

    Args:
        call: The function; it must not allocate memory that outlives the call.
        device: The device on which it runs.
        repeats: Number of measurements.
    """
    clock, is_cuda = DeviceClock(device), device.type == "cuda"
    times = []
    with torch.cuda.device(device) if is_cuda else nullcontext():
        timed, calls = (_captured(call), CALLS_PER_GRAPH) if is_cuda else (_warm(call), 1)
        for _ in range(repeats):
            first = clock.mark()
            timed()
            times.append(1e3 * clock.seconds(first, clock.mark()) / calls)
    low, median, high = statistics.quantiles(times, n=4)
    return Spread(median, low, high)


def _warm(call: Callable[[], object]) -> Callable[[], object]:
    for _ in range(WARM_UPS):
        call()
    return call


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """Capture `CALLS_PER_GRAPH` calls as a CUDA graph; return its replay, which has run once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _warm(call)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call()
    graph.replay()
    return graph.replay
