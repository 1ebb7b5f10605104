"""Copies of a model's module tree that share every tensor with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def tensors_by_id(model: PreTrainedModel) -> dict[int, Any]:
    """Return what `copy.deepcopy` leaves out when it gets this as its memo: all tensors.

    Layers of bitsandbytes have tensors beside parameters and buffers, in an object that describes
    the quantisation; such objects are shared whole.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    states = {
        id(value): value
        for module in model.modules()
        for value in vars(module).values()
        if any(isinstance(part, Tensor) for part in getattr(value, "__dict__", {}).values())
    }
    return tensors | states
