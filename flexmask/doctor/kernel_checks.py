"""Check of flexmask's decode kernels against their reference implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from flexmask.doctor.check_result import Check, WrongResult, tried
from flexmask.kernels.decode_attention import decode_attention
from flexmask.kernels.projection import project

TOLERANCE = 1e-4
"""Largest relative error in float32."""


def check_decode_kernels(device: torch.device) -> Check:
    """Check the kernels of the decode step, which run on GPUs only."""
    if device.type != "cuda":
        return Check("decode kernels", "unavailable", "needs a GPU")
    return tried(
        "decode kernels",
        lambda: _compared(device),
        "Triton does not work here; reinstall torch with the triton of its version",
    )


def _compared(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    own = [random(2, 6, 64), random(2, 2, 64), random(2, 2, 64)]
    angles, caches = [random(2, 64), random(2, 64)], [random(2, 2, 256, 64) for _ in range(2)]
    attention = [*own, *angles, *caches, torch.tensor([200, 31])]
    weights = [random(96, 128), random(96, 128)]
    x, norm = random(2, 128), random(128)
    errors = [
        _relative_error(
            decode_attention(*(tensor.to(device) for tensor in attention), 0.125, 0.0),
            decode_attention(*attention, 0.125, 0.0),
        ),
        _relative_error(
            project(
                x.to(device),
                [w.to(device) for w in weights],
                [],
                [],
                norm.to(device),
                1e-5,
                "silu",
                None,
            ),
            project(x, weights, [], [], norm, 1e-5, "silu", None),
        ),
    ]
    if not max(errors) < TOLERANCE:
        raise WrongResult(f"differ from plain operations by {max(errors):.2g}")
    return f"attention and projections within {max(errors):.0e} of plain operations"


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu() - wanted).norm() / wanted.norm())
