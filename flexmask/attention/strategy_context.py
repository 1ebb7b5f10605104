"""`use_strategy`: a context in which ``model.generate`` runs under a mask strategy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from flexmask.attention.model_probe import ModelProbe, probe_model
from flexmask.errors import AttentionError
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch
from flexmask.strategy import Strategy


class ActiveStrategy:
    """The strategy of a `use_strategy` context, and its left-padded batch."""

    def __init__(
        self, strategy: Strategy, layouts: Sequence[Layout], device: torch.device
    ) -> None:
        """Pad ``layouts`` on the left to the longest, as ``model.generate`` expects."""
        self.strategy = strategy
        self.layouts = tuple(layouts)
        self.device = device
        self.length = max(map(len, layouts))
        self.has_attended = False
        self._masks_own_scores = False
        self._batch: LayoutBatch | None = None

    @property
    def is_sequential(self) -> bool:
        """True if positions are slot numbers in every row."""
        return all(layout.position_ids == tuple(range(len(layout))) for layout in self.layouts)

    def batch(self, capacity: int) -> LayoutBatch:
        """Return buffers of at least ``capacity`` slots; all after the prompt are fusion tail."""
        if self._batch is None or self._batch.segment_ids.shape[1] < capacity:
            lengths = [len(layout) for layout in self.layouts]
            starts = [self.length - length for length in lengths]
            self._batch = LayoutBatch(len(self.layouts), capacity, self.device)
            self._batch.load(self.layouts, lengths, starts)
            self._batch.open_tail([self.length] * len(self.layouts))
        return self._batch

    def check_batch_size(self, batch_size: int) -> None:
        """Check that the model's batch has as many rows as this context.

        Raises:
            AttentionError: If it has another number of rows.
        """
        if batch_size != len(self.layouts):
            raise AttentionError(
                f"the model runs {batch_size} rows under use_strategy, which holds "
                f"{len(self.layouts)}; give use_strategy one request per row (and per beam or "
                "returned sequence)"
            )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Probe the first model that runs inside, before it runs."""
        with ExitStack() as self._hooks:
            self._first = self._hooks.enter_context(
                register_module_forward_pre_hook(self._look_at)
            )
            yield

    def _look_at(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Check that a strategy can mask a model.

        Raises:
            AttentionError: If it cannot (`probe_model`).
        """
        if active_strategy() is not self or not isinstance(module, PreTrainedModel):
            return
        self._first.remove()  # or the probing passes would call this hook again
        if module not in _probed:
            _probed[module] = probe_model(module)
        probe = _probed[module]
        self._masks_own_scores = probe.has_own_scores
        if probe.rotation_limit is not None and len(self.layouts) > 1:
            name, limit = type(module).__name__, probe.rotation_limit
            _check_position(name, max(max(layout.position_ids) for layout in self.layouts), limit)

            def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if (positions := kwargs.get("position_ids")) is not None:
                    _check_position(name, int(positions.max()), limit)

            self._hooks.enter_context(module.register_forward_pre_hook(check, with_kwargs=True))

    def note_dense_mask(self) -> None:
        """Record that a model has taken a dense mask.

        A model that masks scores in code of its own attends under it, as its probe has shown;
        other models call `note_attention` through the backend.
        """
        if self._masks_own_scores:
            note_attention()

    def model_inputs(self) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``position_ids``, ``(B, length)`` each."""
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
_probed: WeakKeyDictionary[nn.Module, ModelProbe] = WeakKeyDictionary()


def note_attention() -> None:
    """Record for an active `use_strategy` that a model attends through flexmask."""
    if not torch.compiler.is_compiling() and (active := _active.get()) is not None:
        active.has_attended = True


def _check_position(model: str, position: int, limit: int) -> None:
    """Check that each row has the rotary embeddings that it would have alone.

    Raises:
        AttentionError: If a row reaches the length that changes those of all rows.
    """
    if position >= limit:
        raise AttentionError(
            f"a row reaches position {position}, and from {limit} on {model} changes the rotary "
            "embeddings of all rows of a batch; run longer prompts one at a time"
        )


def active_strategy() -> ActiveStrategy | None:
    """Return the innermost `use_strategy` context, if any."""
    return _active.get()


@contextmanager
def use_strategy(
    strategy: Strategy, layouts: Sequence[Layout], device: torch.device | str = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Run the models inside under the mask of ``strategy``.

    Example::

        layouts = [strategy.layout(tokenize(request)) for request in requests]
        with use_strategy(strategy, layouts, model.device) as inputs:
            model.generate(**inputs, max_new_tokens=20)

    Args:
        strategy: The strategy.
        layouts: One layout for each row.
        device: The device of the model.

    Yields:
        Left-padded inputs for ``model.generate``: ``input_ids``, ``attention_mask`` and
        ``position_ids``, ``(B, S)`` each.

    Raises:
        AttentionError: If the strategy changes scores, if a mask cannot isolate segments in the
            model (docs/models.md), or if at the end no model has attended through flexmask.
    """
    active = ActiveStrategy(strategy, layouts, torch.device(device))
    batch = active.batch(active.length)
    if strategy.changes_scores(batch):
        raise AttentionError(
            f"strategy {strategy.name!r} changes scores, which model.generate does not support; "
            "use flexmask.Engine"
        )
    token = _active.set(active)
    try:
        with active.watching():
            yield active.model_inputs()
    finally:
        _active.reset(token)
    if not active.has_attended:
        raise AttentionError(
            f"no model attended through flexmask under strategy {strategy.name!r}; load it with "
            "attn_implementation='flexmask'"
        )
