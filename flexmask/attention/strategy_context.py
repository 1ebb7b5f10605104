"""Strategies for ``model.generate``: a context in which the backend masks by a strategy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from flexmask.errors import AttentionError
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch
from flexmask.strategy import Strategy


class ActiveStrategy:
    """A strategy and the left-padded batch that it masks."""

    def __init__(
        self, strategy: Strategy, layouts: Sequence[Layout], device: torch.device
    ) -> None:
        """Pad ``layouts`` on the left to the longest, as ``model.generate`` wants them."""
        self.strategy = strategy
        self.layouts = tuple(layouts)
        self.device = device
        self.length = max(map(len, layouts))
        self._batch: LayoutBatch | None = None

    @property
    def is_sequential(self) -> bool:
        """Whether positions are slot numbers in every row."""
        return all(layout.position_ids == tuple(range(len(layout))) for layout in self.layouts)

    def batch(self, capacity: int) -> LayoutBatch:
        """Buffers of at least ``capacity`` slots; slots after the prompt are the fusion tail."""
        if self._batch is None or self._batch.segment_ids.shape[1] < capacity:
            lengths = [len(layout) for layout in self.layouts]
            starts = [self.length - length for length in lengths]
            self._batch = LayoutBatch(len(self.layouts), capacity, self.device)
            self._batch.load(self.layouts, lengths, starts)
            self._batch.open_tail([self.length] * len(self.layouts))
        return self._batch

    def check_batch_size(self, batch_size: int) -> None:
        """Check that the model runs the rows of this context.

        Raises:
            AttentionError: If it runs another number of rows.
        """
        if batch_size != len(self.layouts):
            raise AttentionError(
                f"the model runs {batch_size} rows under use_strategy, which holds "
                f"{len(self.layouts)}; give use_strategy one request per row (and per beam or "
                "returned sequence)"
            )

    def model_inputs(self) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``position_ids``, ``(B, length)`` each."""
        shape = (len(self.layouts), self.length)
        inputs = {
            name: torch.zeros(shape, dtype=torch.long)
            for name in ("input_ids", "attention_mask", "position_ids")
        }
        for row, layout in enumerate(self.layouts):
            start = self.length - len(layout)
            inputs["input_ids"][row, start:] = layout.token_tensor
            inputs["attention_mask"][row, start:] = 1
            inputs["position_ids"][row, start:] = layout.position_tensor
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}


_active: ContextVar[ActiveStrategy | None] = ContextVar("flexmask_strategy", default=None)


def active_strategy() -> ActiveStrategy | None:
    """The innermost `use_strategy` context, if any."""
    return _active.get()


@contextmanager
def use_strategy(
    strategy: Strategy, layouts: Sequence[Layout], device: torch.device | str = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Mask the models that run inside by ``strategy``.

    Example::

        layouts = [strategy.layout(tokenize(request)) for request in requests]
        with use_strategy(strategy, layouts, model.device) as inputs:
            model.generate(**inputs, max_new_tokens=20)

    Args:
        strategy: The strategy.
        layouts: One layout for each row.
        device: Where the model is.

    Yields:
        Left-padded inputs for ``model.generate``: ``input_ids``, ``attention_mask`` and
        ``position_ids``, ``(B, S)`` each.

    Raises:
        AttentionError: If the strategy changes scores.
    """
    active = ActiveStrategy(strategy, layouts, torch.device(device))
    batch = active.batch(active.length)
    if strategy.changes_scores(batch):
        raise AttentionError(
            f"strategy {strategy.name!r} changes scores, which model.generate cannot be told; "
            "use flexmask.Engine"
        )
    token = _active.set(active)
    try:
        yield active.model_inputs()
    finally:
        _active.reset(token)
