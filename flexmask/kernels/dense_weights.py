"""Tells linear layers with plain weights, which kernels may read, from all others.

Quantised layers have weights of another class or dtype, a class of their own, or a forward of
their own. They compute by their own code.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from flexmask.torch_internals import is_wrapper_subclass

DENSE = "dense"
"""The kind of plain layers."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_dense(weight: Tensor) -> bool:
    """Return True if a weight is a strided matrix of floating-point numbers and nothing more."""
    is_strided = weight.layout == torch.strided
    return is_strided and weight.dtype in DTYPES and not is_wrapper_subclass(weight)


def is_plain_linear(module: nn.Module) -> bool:
    """Return True if a module is a `torch.nn.Linear` with a dense weight and its own forward."""
    return type(module) is nn.Linear and "forward" not in vars(module) and is_dense(module.weight)


def kinds_of_projections(model: nn.Module) -> Counter[str]:
    """Count the linear layers of a model by kind: `DENSE`, or what its weights are."""
    return Counter(
        DENSE if is_plain_linear(module) else _kind(module)
        for module in model.modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def _kind(module: Any) -> str:
    """Return the class that makes a layer another, and its package."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} of {_package(type(module))}"
    if "forward" in vars(module):
        return f"Linear with a forward of {_package(module.forward)}"
    if is_wrapper_subclass(module.weight):
        return f"{type(module.weight).__name__} of {_package(type(module.weight))}"
    return str(module.weight.dtype).removeprefix("torch.")


def _package(thing: Any) -> str:
    return str(thing.__module__).partition(".")[0]
