"""A mask as tiles of its BlockMask, and the pairs of partial tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flexmask.block_mask import MaskReport, explain_mask
from flexmask.block_mask.intervals.evaluator import MaskEvaluator
from flexmask.block_mask.intervals.interval import exact_index
from flexmask.block_mask.tile_states import EMPTY, FULL, PARTIAL
from flexmask.errors import OptionError
from flexmask.mod_types import MaskMod

TILE = 128
"""Tokens along a side of a tile, as in the engine and in FlexAttention."""

MAX_TILES = 8192
"""Most tiles along an axis: a million tokens in tiles of 128."""

PAIRS_AT_ONCE = 2**20
"""Pairs evaluated at once; each takes some tens of bytes."""


@dataclass(frozen=True)
class TileMask:
    """A mask over ``size`` tokens, whose pairs are evaluated tile by tile.

    Attributes:
        mask_mod: The mask.
        size: Number of queries, and of keys.
        tile: Tokens along a side of a tile.
        report: Its BlockMask, with counts of tiles and pairs.
    """

    mask_mod: MaskMod
    size: int
    tile: int
    report: MaskReport

    @classmethod
    def build(cls, mask_mod: MaskMod, size: int, tile: int) -> TileMask:
        """Build the BlockMask.

        Raises:
            OptionError: If there would be too many tiles.
            MaskError: If the mask_mod breaks a rule of FlexAttention.
        """
        if -(-size // tile) > MAX_TILES:
            raise OptionError(
                f"{size:,} tokens in tiles of {tile} are too many to draw; take larger tiles "
                f"(`tile={-(-size // MAX_TILES)}`)"
            )
        report = explain_mask(mask_mod, 1, None, size, size, "cpu", tile)
        return cls(mask_mod, size, tile, report)

    def at(self, tile: int) -> TileMask:
        """Return the same mask in tiles of another size."""
        return self if tile == self.tile else TileMask.build(self.mask_mod, self.size, tile)

    @property
    def states(self) -> Tensor:
        """State of each tile (EMPTY, PARTIAL or FULL): ``(tiles, tiles)`` uint8."""
        return self.report.states[0, 0]

    @property
    def partial_tiles(self) -> Tensor:
        """Row and column of each partial tile, in row-major order: ``(N, 2)``."""
        return (self.states == PARTIAL).nonzero()

    def pairs(self, tiles: Tensor) -> Iterator[Tensor]:
        """Evaluate the mask on all pairs of the given tiles, in chunks.

        Args:
            tiles: Row and column of each tile: ``(N, 2)``.

        Yields:
            ``(n, tile, tile)`` bool; pairs past the last token are False.
        """
        evaluator = MaskEvaluator(self.mask_mod, torch.device("cpu"))
        step = torch.arange(self.tile)
        last = self.size - 1
        at_once = max(1, PAIRS_AT_ONCE // self.tile**2)
        for start in range(0, len(tiles), at_once):
            some = tiles[start : start + at_once]
            zero = torch.zeros(len(some), 1, 1, dtype=torch.int64)
            slots = some[:, :, None] * self.tile + step
            q, kv = slots[:, 0, :, None], slots[:, 1, None, :]
            allowed = evaluator.pairs(
                exact_index(zero, 1, evaluator),
                exact_index(zero, 1, evaluator),
                exact_index(q.clamp(max=last), self.size, evaluator),
                exact_index(kv.clamp(max=last), self.size, evaluator),
            )
            yield allowed & (q <= last) & (kv <= last)

    @cached_property
    def dense(self) -> Tensor:
        """The dense mask, ``(size, size)`` bool; for masks that are drawn token by token."""
        states = self.states
        square = states.repeat_interleave(self.tile, 0).repeat_interleave(self.tile, 1) == FULL
        blocks = square.view(len(states), self.tile, len(states), self.tile)
        tiles = self.partial_tiles
        start = 0
        for allowed in self.pairs(tiles):
            rows, columns = tiles[start : start + len(allowed)].unbind(1)
            blocks[rows, :, columns] = allowed
            start += len(allowed)
        return square[: self.size, : self.size]

    @cached_property
    def is_skipped(self) -> Tensor:
        """True for pairs in tiles that kernels skip: ``(size, size)`` bool."""
        empty = self.states == EMPTY
        square = empty.repeat_interleave(self.tile, 0).repeat_interleave(self.tile, 1)
        return square[: self.size, : self.size]
