"""Which kernel computes prompts on a GPU, and with which tiles."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib.util import find_spec

import torch

from flexmask.attention.flex_call import PrefillKernel, has_triton_options
from flexmask.attention.model_probe import AttentionShape
from flexmask.errors import AttentionError, FlexMaskWarning
from flexmask.strategy import Strategy

BLOCK_SIZE = 128
"""The largest tile side."""

Tile = tuple[int, int]
"""Queries and keys of a tile."""

TILES: tuple[tuple[int, Tile], ...] = (
    ((1 << 11) + BLOCK_SIZE, (64, 32)),
    ((1 << 15) + BLOCK_SIZE, (64, 64)),
)
"""Up to which capacity tiles are smaller with Triton's kernel, since more of short prompts' tiles
are partial and small ones skip more: by 5 to 9% for 64 rows of 1,280 slots (H100), and by 17% at
16k (H200)."""

CPU_TILE: Tile = (64, 64)
"""On a CPU 5 to 15% faster than 128 where few tokens are computed, and no slower at 4k slots."""

FLASH_CAPACITY = 1 << 14
"""From here on FLASH is chosen where it can be had: it takes 28% less time at 16k slots, 10% at 4k
(H100), and is compiled in every process anew."""


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
            asked: The kernel asked for; None to choose.
            shapes: Those of the model's attention modules.
            dtype: The model's.
            device: The model's.

        Raises:
            AttentionError: If the kernel asked for cannot be had.
        """
        shapes = list(shapes)
        self.asked = asked
        self._is_cuda = device.type == "cuda"
        self._has_options = all(
            has_triton_options(dtype, shape.key_dim, shape.value_dim) for shape in shapes
        )
        self._flash_refuses: set[Strategy] = set()
        if asked is not None and not self._is_cuda:
            raise AttentionError(f"prefill kernel {asked!r} runs on a GPU only")
        self._has_flash = self._is_cuda and all(flash_can_attend(s, dtype, device) for s in shapes)
        if asked == "flash" and not self._has_flash:
            raise AttentionError(
                "prefill kernel 'flash' needs flexmask[flash] installed, a Hopper GPU or later, "
                "bfloat16 or float16, heads of 64 or 128, and no soft-capping"
            )

    def choose(
        self, strategy: Strategy, capacity: int, *, changes_scores: bool
    ) -> PrefillKernel | None:
        """Choose for rows of ``capacity`` slots; None on a CPU, which has one kernel.

        Raises:
            AttentionError: If the kernel asked for does not compute what the strategy does.
        """
        if self.asked == "flash" and changes_scores:
            raise AttentionError(
                "the strategy changes scores, which prefill kernel 'flash' does not compute; "
                "leave the kernel to be chosen"
            )
        if self.asked is not None or not self._is_cuda:
            return self.asked
        is_legal = not changes_scores and strategy not in self._flash_refuses
        is_faster = capacity >= FLASH_CAPACITY
        return "flash" if self._has_flash and is_legal and is_faster else "triton"

    def tile(self, kernel: PrefillKernel | None, capacity: int) -> Tile:
        """Choose tiles for a kernel and rows of ``capacity`` slots."""
        return prefill_tile(kernel, capacity, has_options=self._has_options)

    def replace_flash(self, strategy: Strategy, error: Exception) -> PrefillKernel:
        """Choose another kernel for a strategy whose mask FLASH turned out not to compile.

        Raises:
            AttentionError: If FLASH was asked for.
        """
        reason = _first_words(error)
        if self.asked == "flash":
            raise AttentionError(
                f"prefill kernel 'flash' cannot compile the mask of strategy {strategy.name!r}: "
                f"{reason}; leave the kernel to be chosen"
            ) from error
        self._flash_refuses.add(strategy)
        warnings.warn(
            f"prefill kernel 'flash' cannot compile the mask of strategy {strategy.name!r}, so "
            f"Triton's computes the prompts: {reason}",
            FlexMaskWarning,
            stacklevel=2,
        )
        return "triton"


def _first_words(error: Exception) -> str:
    """What an error of the compiler says, without the graph that it prints."""
    words = " ".join(str(error).replace("=", " ").split())
    return words if len(words) <= 200 else f"{words[:200]} …"


def prefill_tile(kernel: PrefillKernel | None, capacity: int, *, has_options: bool) -> Tile:
    """Choose tiles.

    Args:
        kernel: What computes prompts; None on a CPU.
        capacity: Slots of a row.
        has_options: Whether there are `TRITON_OPTIONS` for the model's heads; those that
            FlexAttention takes by itself may be wider than the smallest tile.
    """
    if kernel is None:
        return CPU_TILE
    if kernel == "triton":
        for most, tile in TILES:
            if capacity <= most and has_options:
                return tile
    return (BLOCK_SIZE, BLOCK_SIZE)


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
