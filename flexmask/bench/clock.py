"""Times of a call on a device: median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UPS = 2
CALLS_PER_GRAPH = 4


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
    """Time a call once it is warm; on a GPU as a CUDA graph, so that launching does not count.

    Args:
        call: What to time; it allocates nothing that outlives it.
        device: Where it runs.
        repeats: How often.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            times = _graph_ms(call, repeats)
    else:
        times = _wall_ms(call, repeats)
    low, median, high = statistics.quantiles(times, n=4)
    return Spread(median, low, high)


def _wall_ms(call: Callable[[], object], repeats: int) -> list[float]:
    for _ in range(WARM_UPS):
        call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return times


def _graph_ms(call: Callable[[], object], repeats: int) -> list[float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS_PER_GRAPH)
    return times
