"""Which kernel computes prompts on a GPU, and with which tiles."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import torch

from flexmask.attention.backend import AttentionShape, PrefillKernel
from flexmask.errors import AttentionError

BLOCK_SIZE = 128
"""Tile side; prefill lengths are multiples of it."""

SHORT_BLOCK_SIZE = 64
"""Tile side of short prompts on a GPU, where more tiles are partial and small ones skip more."""

SHORT_CAPACITY = (1 << 15) + BLOCK_SIZE
"""Up to here the short tile wins with Triton's kernel (17% at 16k slots, H200)."""


class PrefillKernels:
    """What FlexAttention can compute the prompts of one model with."""

    def __init__(
        self,
        asked: PrefillKernel | None,
        shapes: Iterable[AttentionShape],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Find out what there is.

        Args:
            asked: The kernel asked for; None for Triton's.
            shapes: Those of the model's attention modules.
            dtype: The model's.
            device: The model's.

        Raises:
            AttentionError: If the kernel asked for cannot be had.
        """
        self._asked = asked
        self._is_cuda = device.type == "cuda"
        if asked is not None and not self._is_cuda:
            raise AttentionError(f"prefill kernel {asked!r} runs on a GPU only")
        if asked == "flash" and not all(flash_can_attend(s, dtype, device) for s in shapes):
            raise AttentionError(
                "prefill kernel 'flash' needs flexmask[flash] installed, a Hopper GPU or later, "
                "bfloat16 or float16, heads of 64 or 128, and no soft-capping"
            )

    def choose(self, changes_scores: bool) -> PrefillKernel | None:
        """Choose for a strategy; None on a CPU, which has one kernel.

        Raises:
            AttentionError: If the kernel asked for does not compute what the strategy does.
        """
        if self._asked == "flash" and changes_scores:
            raise AttentionError(
                "the strategy changes scores, which prefill kernel 'flash' does not compute; "
                "leave the kernel to be chosen"
            )
        return self._asked or ("triton" if self._is_cuda else None)


def prefill_tile(kernel: PrefillKernel | None, capacity: int) -> int:
    """Side of the tiles for a kernel and rows of ``capacity`` slots."""
    is_short = kernel == "triton" and capacity <= SHORT_CAPACITY
    return SHORT_BLOCK_SIZE if is_short else BLOCK_SIZE


def has_flash() -> bool:
    """Whether flash-attn-4 is installed."""
    # The name inside a package can only be looked for where there is the package.
    return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None


def flash_can_attend(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether FlexAttention's FLASH backend is installed, and serves heads of this shape."""
    return (
        has_flash()
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and shape.key_dim == shape.value_dim
        and shape.key_dim in (64, 128)
        and not shape.has_softcap
    )
