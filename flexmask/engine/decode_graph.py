"""A decode step captured as a CUDA graph: recorded once, replayed without the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_STEPS = 2
"""Steps before the capture: the first compiles, the second allocates what stays."""


class DecodeGraph:
    """Replays ``step``, which turns token ids ``(B, 1)`` into logits ``(B, V)``.

    Everything that a step reads or writes must stay where it is: weights, caches, index tensors.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], slots: Tensor, token_ids: Tensor) -> None:
        """Capture ``step`` at the slots and tokens that the next step has.

        Args:
            step: One decode step; adds one to ``slots``.
            slots: ``(B,)``; as before when this returns. Keys and values that warming up writes
                there are those that the next step writes.
            token_ids: ``(B, 1)`` tokens of the next step.

        Raises:
            RuntimeError: If the step does something that cannot be captured.
        """
        first_slots = slots.clone()
        self._token_ids = token_ids.clone()
        stream = torch.cuda.Stream(slots.device)
        stream.wait_stream(torch.cuda.current_stream(slots.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                step(self._token_ids)
                slots.copy_(first_slots)
        torch.cuda.current_stream(slots.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = step(self._token_ids)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Run the next step."""
        self._token_ids.copy_(token_ids)
        self._graph.replay()
        return self._logits.clone()
