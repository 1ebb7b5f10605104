"""What is found out of a mask: the states of its tiles, and the axes along which they lie."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from flexmask.block_mask.intervals.evaluator import MaskEvaluator
from flexmask.block_mask.intervals.interval import Interval, Span, exact_index

EMPTY, PARTIAL, FULL = 0, 1, 2
"""States of a tile. Until it is decided, a tile counts as partial."""

SPLIT = 8
"""Into how many parts a cell is split along an axis."""
MIN_SUB_TILE = 8


class Decided(enum.IntEnum):
    """How a tile was decided."""

    BY_INTERVALS = 0
    BY_SUB_TILES = 1
    BY_SAMPLES = 2
    BY_PAIRS = 3


@dataclass(frozen=True, slots=True)
class Axis:
    """Queries or keys of a mask.

    Attributes:
        start: Index of the first.
        length: How many there are.
        tile: How many make a tile.
    """

    start: int
    length: int
    tile: int

    @property
    def parts(self) -> int:
        """Into how many sub-tiles a tile is split along this axis."""
        counts = range(SPLIT, 1, -1)
        return next((n for n in counts if self.tile % n == 0 and self.tile >= n * MIN_SUB_TILE), 1)

    def count(self, width: int) -> int:
        """Return how many cells of ``width`` indices there are."""
        return -(-self.length // width)

    def cells(self, cell: Tensor, width: int, evaluator: MaskEvaluator) -> Interval:
        """Return the index in cells of ``width``; a number past the end means the last cell."""
        if self.length % (width * SPLIT):
            cell = cell.clamp(max=self.count(width) - 1)
        bounds = (self.start, self.start + self.length - 1)
        last = self.start + width - 1
        first_cell = torch.linspace(self.start, last, 2, dtype=torch.int64, device=cell.device)
        ends = torch.add(first_cell.view(2, *(1,) * cell.dim()), cell, alpha=width)
        if self.length % width:
            ends = ends.clamp(max=bounds[1])
        span = Span(cell, self.start, width, self.length)
        return Interval(ends, evaluator, bounds=bounds, span=span)

    def all_cells(
        self, numbers: Tensor, width: int, dim: int, evaluator: MaskEvaluator
    ) -> Interval:
        """Return the index in every cell of ``width``, along one dimension of a grid.

        Args:
            numbers: 0, 1, … to past the last cell.
            width: Indices per cell.
            dim: Which of the four dimensions of the grid.
            evaluator: Who applies operations to it.
        """
        count = self.count(width)
        shape = [1, 1, 1, 1]
        shape[dim] = count
        # First and last index of each cell, without computing them; a CPU reads every element
        # faster once they stand side by side, a GPU has one launch less.
        ends = numbers.as_strided((2, count), (width - 1, width)).view(2, *shape)
        if self.start:
            ends = ends + self.start
        elif not ends.is_cuda:
            ends = ends.contiguous()
        bounds = (self.start, self.start + self.length - 1)
        if self.length % width:
            ends = ends.clamp(max=bounds[1])
        cell = numbers[:count].view(shape)
        span = Span(cell, self.start, width, self.length, is_whole=True)
        return Interval(ends, evaluator, bounds=bounds, span=span)

    def indices(self, tile: Tensor, step: Tensor, evaluator: MaskEvaluator) -> Interval:
        """Return the indices ``step`` into tiles; one past the end means the last one."""
        index = torch.add(step, tile, alpha=self.tile)
        if self.length % self.tile:
            index = index.clamp(max=self.length - 1)
        if self.start:
            index = index + self.start
        return exact_index(index, self.length, evaluator, self.start)


@dataclass(frozen=True, slots=True)
class MaskShape:
    """The extent of a mask, and how much memory evaluation may take."""

    B: int
    H: int
    q: Axis
    kv: Axis
    device: torch.device
    memory_bytes: int

    def grid(self, scale: int = 1) -> tuple[int, int]:
        """Return rows and columns of cells that are ``scale`` tiles high and wide."""
        return self.q.count(self.q.tile * scale), self.kv.count(self.kv.tile * scale)


@dataclass(frozen=True, slots=True)
class TileStates:
    """The state of each tile.

    Attributes:
        states: EMPTY, PARTIAL or FULL, ``(B or 1, H or 1, rows, columns)`` uint8; 1 where the
            mask depends on neither batch row nor head.
        decided: How each was decided, in the same shape, if recorded.
    """

    states: Tensor
    decided: Tensor | None
