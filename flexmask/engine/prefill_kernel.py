"""The choice of the kernel that computes prompts on a GPU, and of its tiles."""

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
"""Smaller tiles of Triton's kernel, each with the largest capacity that they are used for. More
tiles of short prompts are partial, and small tiles skip more: prefill takes 5 to 9% less time for
64 rows of 1,280 slots (H100), and 17% less at 16k slots (H200)."""

CPU_TILE: Tile = (64, 64)
"""On a CPU 5 to 15% faster than tiles of 128 for few tokens, and no slower at 4k slots."""

FLASH_CAPACITY = 1 << 14
"""Smallest capacity in slots for which FLASH is chosen where it is available. It takes 28% less
time at 16k slots and 10% less at 4k (H100), but every process compiles it again."""


class PrefillKernels:
    """The kernels with which FlexAttention can compute the prompts of one model.

    Attributes:
        asked: The kernel that the user asked for; None to choose.
    """

    def __init__(
        self,
        asked: PrefillKernel | None,
        shapes: Iterable[AttentionShape],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Find out which kernels are available.

        Args:
            asked: The kernel that the user asked for; None to choose.
            shapes: Sizes of heads of the model's attention modules.
            dtype: The model's dtype.
            device: The model's device.

        Raises:
            AttentionError: If the kernel asked for is not available.
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
        """Choose the kernel for rows of ``capacity`` slots; None on a CPU, which has one kernel.

        Raises:
            AttentionError: If the kernel asked for does not support changes of scores.
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
        """Choose another kernel for a strategy whose mask FLASH cannot compile.

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
    """Shorten an error of the compiler, which prints a whole graph."""
    words = " ".join(str(error).replace("=", " ").split())
    return words if len(words) <= 200 else f"{words[:200]} …"


def prefill_tile(kernel: PrefillKernel | None, capacity: int, *, has_options: bool) -> Tile:
    """Choose the tiles of a prefill.

    Args:
        kernel: The kernel that computes prompts; None on a CPU.
        capacity: Slots per row.
        has_options: True if there are `TRITON_OPTIONS` for the model's heads. The blocks that
            FlexAttention chooses by itself may be larger than the smallest tile.
    """
    if kernel is None:
        return CPU_TILE
    if kernel == "triton":
        for most, tile in TILES:
            if capacity <= most and has_options:
                return tile
    return (BLOCK_SIZE, BLOCK_SIZE)


def whole_tiles(length: int, side: int) -> int:
    """Round a length up to whole tiles."""
    return -(-length // side) * side


def has_flash() -> bool:
    """Return whether flash-attn-4 is installed."""
    # find_spec of a name in a package raises where the package is missing.
    return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None


def flash_can_attend(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether FlexAttention's FLASH backend is installed and supports these heads."""
    return (
        has_flash()
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and shape.key_dim == shape.value_dim
        and shape.key_dim in (64, 128)
        and not shape.has_softcap
    )
