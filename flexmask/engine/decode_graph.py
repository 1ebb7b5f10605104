"""A decode step captured as a CUDA graph, which is replayed without the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from flexmask.engine.graph_capture import capturing

WARM_UP_STEPS = 2
"""Steps before the capture: the first compiles, the second allocates what stays."""


Output = TypeVar("Output")


class DecodeGraph(Generic[Output]):
    """A CUDA graph of one step; the decode loop captures it.

    Everything that a step reads or writes must keep its address: weights, caches, buffers.
    """

    def __init__(self, step: Callable[[], Output], state: Sequence[Tensor]) -> None:
        """Capture ``step``.

        Args:
            step: One decode step, which reads and writes ``state``.
            state: Tensors that a step changes, on one device. They are restored before this
                returns. Keys and values need no restoring: warm-up steps write the same ones that
                the next step writes.

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
        with capturing(self._graph):
            self._output = step()

    def replay(self) -> Output:
        """Run the step again; returns the same tensors each time, with new content."""
        self._graph.replay()
        return self._output
