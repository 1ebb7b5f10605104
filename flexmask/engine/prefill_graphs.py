"""Prefills captured as CUDA graphs, one for each size of a stream."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexmask.engine.graph_capture import GraphCapture, capturing
from flexmask.engine.stream_inputs import StreamInputs

MOST_TOKENS = 6144
"""Most tokens of a stream that is captured. More keep the device busy for longer than the host
takes to queue them."""

MOST_GRAPHS = 48
"""Graphs that are kept, those used last."""


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    packed: Tensor
    inputs: StreamInputs


class PrefillGraphs:
    """Runs prefills; on a GPU, short ones through CUDA graphs.

    Queuing the kernels of a prefill takes the host longer than the device takes to compute a
    thousand tokens, and replaying a graph takes it no time. A stream of some size is captured
    when that size occurs for the second time; the first time compiles, and shows that it runs.
    """

    def __init__(self, device: torch.device) -> None:
        """Start without graphs."""
        self._device = device
        self._graphs: OrderedDict[tuple[int, ...], _Graph | None] = OrderedDict()
        self._pool: Any = None
        self._capture = GraphCapture("prefill runs")

    def clear(self) -> None:
        """Forget all graphs; call it when a buffer that they use is replaced."""
        self._graphs.clear()
        self._pool = None

    def run(
        self, compute: Callable[[StreamInputs], None], inputs: StreamInputs, slack: int
    ) -> None:
        """Copy inputs to the device and compute.

        Args:
            compute: Reads inputs on the device; everything else that it reads or writes keeps
                its address until `clear`.
            inputs: The inputs on the host.
            slack: Numbers in memory behind the inputs (`stream_block_mask`).
        """
        packed = inputs.packed(slack)
        graph = self._graph_for(compute, inputs, packed)
        if graph is None:
            compute(inputs.over(packed.to(self._device, non_blocking=True)))
        else:
            graph.graph.replay()

    def _graph_for(
        self, compute: Callable[[StreamInputs], None], inputs: StreamInputs, packed: Tensor
    ) -> _Graph | None:
        """Return the graph of inputs of this size, with these inputs; None to run without one."""
        is_short = len(inputs.token_ids) <= MOST_TOKENS
        if self._device.type != "cuda" or not is_short or self._capture.no_graph_reason:
            return None
        sizes = inputs.sizes
        graph = self._graphs.get(sizes)
        if graph is not None:
            graph.packed.copy_(packed, non_blocking=True)
        elif sizes in self._graphs:
            graph = self._capture.attempt(lambda: self._captured(compute, inputs, packed))
        self._keep(sizes, graph)
        return graph

    def _keep(self, sizes: tuple[int, ...], graph: _Graph | None) -> None:
        self._graphs[sizes] = graph
        self._graphs.move_to_end(sizes)
        while len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)

    def _captured(
        self, compute: Callable[[StreamInputs], None], inputs: StreamInputs, packed: Tensor
    ) -> _Graph:
        """Capture a prefill.

        Raises:
            RuntimeError: If it does something that cannot be captured.
        """
        on_device = packed.to(self._device)
        graph = torch.cuda.CUDAGraph()
        given = inputs.over(on_device)
        with capturing(graph, self._pool):
            compute(given)
        # Graphs run one after the other, so they can share the memory of intermediate tensors.
        self._pool = self._pool or graph.pool()
        return _Graph(graph, on_device, given)
