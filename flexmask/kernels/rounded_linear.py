"""Linear layers whose weights are rounded to 8 bits, with a scale for each row.

In the traced graph a layer is one call of ``flexmask::linear_of_8_bits``. Decoding replaces it by
`flexmask::project`, whose kernel reads the 8 bits. Elsewhere the compiler takes it apart: a kernel
writes the weight of this one layer in the dtype of the inputs, and a matrix product reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number of each dtype that is used; int8's -128 has no counterpart."""


class RoundedLinear(nn.Module):
    """A `torch.nn.Linear` whose weight is rounded; `round_linear_layers` makes it.

    Attributes:
        in_features: Numbers of an input.
        out_features: Numbers of an output.
        weight: ``(N, K)`` of int8 or float8_e4m3fn.
        scale: ``(N, 1)`` float32, by which the rows of `weight` are multiplied.
        bias: ``(N,)`` or None, in the dtype of the layer before.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> None:
        """Round the weight of ``layer`` to ``dtype`` on ``device``, where the result stays."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        digits, scale = rounded_rows(layer.weight.detach().to(device), dtype)
        self.weight = nn.Parameter(digits, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., N)`` of inputs ``(..., K)``."""
        result: Tensor = linear_of_8_bits(x, self.weight, self.scale, self.bias)
        return result


def round_linear_layers(
    model: nn.Module, kept: nn.Module | None, dtype: torch.dtype, device: torch.device
) -> int:
    """Replace the linear layers of a model, one after the other, by rounded ones on a device.

    Args:
        model: The model.
        kept: A layer that stays as it is.
        dtype: int8 or float8_e4m3fn.
        device: The device of the rounded layers.

    Returns:
        The number of layers that were replaced.

    Raises:
        ValueError: If a weight is NaN or infinite.
    """
    count = 0
    for name, parent in model.named_modules():
        for child, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer is kept:
                continue
            rounded = RoundedLinear(layer, dtype, device)
            if not rounded.scale.isfinite().all():
                raise ValueError(f"{name}.{child}.weight holds numbers that are not finite")
            setattr(parent, child, rounded)
            count += 1
    return count


def rounded_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each row to the multiples of its scale, by which its largest number is `LARGEST`.

    Args:
        weight: ``(N, K)``.
        dtype: int8 or float8_e4m3fn.

    Returns:
        Numbers ``(N, K)`` of ``dtype`` and scales ``(N, 1)`` in float32. Their product differs
        from the weight by half a scale at most if ``dtype`` is int8; for float8_e4m3fn by a
        sixteenth of the weight, or a 1024th of the scale if that is more.
    """
    wide = weight.float()
    scale = wide.abs().amax(1, keepdim=True) / LARGEST[dtype]
    scale = torch.where(scale == 0, 1.0, scale)
    digits = (wide / scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (digits.round() if dtype == torch.int8 else digits).to(dtype), scale


_LIBRARY = torch.library.Library("flexmask", "FRAGMENT")
_LIBRARY.define("linear_of_8_bits(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")


@torch.library.impl(_LIBRARY, "linear_of_8_bits", "CompositeImplicitAutograd")
def _linear_of_8_bits(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    # Scaled before the product: in float16, sums of unscaled numbers may overflow.
    return nn.functional.linear(x, (weight.float() * scale).to(x.dtype), bias)


linear_of_8_bits = torch.ops.flexmask.linear_of_8_bits.default
"""The operator: the arguments are those of a `RoundedLinear`, with inputs ``(..., K)`` first."""
