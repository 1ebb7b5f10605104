"""Tells linear layers whose weights kernels can read from all others.

Kernels read dense weights, and weights of 8 bits with a scale for each row: those that flexmask
rounds, and those of torchao. Other quantised layers (other weights, a class or a forward of their
own) compute by their own code.

The attributes of torchao's tensors exist as described in torchao 0.18.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from flexmask.kernels.rounded_linear import RoundedLinear
from flexmask.torch_internals import is_wrapper_subclass

DENSE = "dense"
"""The kind of plain layers."""

ROUNDED = "rounded to"
"""Beginning of the kind of layers that flexmask rounded; the dtype follows."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_EIGHT_BITS = ("Int8Tensor of torchao", "Float8Tensor of torchao")


def is_dense(weight: Tensor) -> bool:
    """Return True if a weight is a strided matrix of floating-point numbers and nothing more."""
    is_strided = weight.layout == torch.strided
    return is_strided and weight.dtype in DTYPES and not is_wrapper_subclass(weight)


def has_scaled_rows(weight: Any) -> bool:
    """Return True if a weight ``(N, K)`` is ``qdata`` of 8 bits times ``scale`` ``(N, 1)``.

    Such are the tensors of torchao that leave inputs as they are; they compute in their ``dtype``.
    Their ``zero_point``, if there is one, is zero.
    """
    if f"{type(weight).__name__} of {_package(type(weight))}" not in _EIGHT_BITS:
        return False
    changes_inputs = weight.act_quant_kwargs or getattr(weight, "act_pre_scale", None) is not None
    return weight.scale.shape == (weight.shape[0], 1) and not changes_inputs


def is_plain_linear(module: nn.Module) -> bool:
    """Return True if a module is a `torch.nn.Linear` with a dense weight and its own forward."""
    return type(module) is nn.Linear and "forward" not in vars(module) and is_dense(module.weight)


def kinds_of_projections(model: nn.Module) -> Counter[tuple[str, bool]]:
    """Count the linear layers of a model by kind, and by whether kernels can read their weights.

    The kind is `DENSE`, begins with `ROUNDED`, or is what makes a layer another.
    """
    return Counter(
        (DENSE, True) if is_plain_linear(module) else (_kind(module), _is_readable(module))
        for module in model.modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def _is_readable(module: nn.Module) -> bool:
    """Return True if kernels can read the weight of a layer that is not plain."""
    return type(module) is RoundedLinear or has_scaled_rows(getattr(module, "weight", None))


def _kind(module: Any) -> str:
    if type(module) is RoundedLinear:
        return f"{ROUNDED} {str(module.weight.dtype).removeprefix('torch.')}"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} of {_package(type(module))}"
    if "forward" in vars(module):
        return f"Linear with a forward of {_package(module.forward)}"
    if is_wrapper_subclass(module.weight):
        return f"{type(module.weight).__name__} of {_package(type(module.weight))}"
    return str(module.weight.dtype).removeprefix("torch.")


def _package(thing: Any) -> str:
    return str(thing.__module__).partition(".")[0]
