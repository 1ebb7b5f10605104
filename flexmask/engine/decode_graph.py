"""A decode step captured as a CUDA graph: recorded once, replayed without the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

WARM_UP_STEPS = 2
"""Steps before the capture: the first compiles, the second allocates what stays."""


Output = TypeVar("Output")


class DecodeGraph(Generic[Output]):
    """Replays a step.

    Everything that a step reads or writes must stay where it is: weights, caches, buffers.
    """

    def __init__(self, step: Callable[[], Output], state: Sequence[Tensor]) -> None:
        """Capture ``step``.

        Args:
            step: One decode step, which reads and writes ``state``.
            state: What a step moves on, on one device; as before when this returns. Keys and
                values that warming up writes are those that the next step writes.

        Raises:
            RuntimeError: If the step does something that cannot be captured.
        """
        before = [tensor.clone() for tensor in state]
        device = state[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                step()
                for tensor, content in zip(state, before, strict=True):
                    tensor.copy_(content)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # What other threads do on the device meanwhile is no part of the step, and no mistake.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = step()

    def replay(self) -> Output:
        """Run the step again; what it returns lies where it always does, with new content."""
        self._graph.replay()
        return self._output
