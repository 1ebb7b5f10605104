"""The states of a mask's tiles, and the two axes of the mask."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from flexmask.block_mask.intervals.evaluator import MaskEvaluator
from flexmask.block_mask.intervals.interval import Interval, Span, exact_index

EMPTY, PARTIAL, FULL = 0, 1, 2
"""States of a tile. An undecided tile counts as partial."""

SPLIT = 8
"""Number of parts into which a cell is split along an axis."""
MIN_SUB_TILE = 8


class Decided(enum.IntEnum):
    """The way in which a tile was decided."""

    BY_INTERVALS = 0
    BY_SUB_TILES = 1
    BY_SAMPLES = 2
    BY_PAIRS = 3


@dataclass(frozen=True, slots=True)
class Axis:
    """The queries or the keys of a mask.

    Attributes:
        start: Index of the first query or key.
        length: Number of queries or keys.
        tile: Queries or keys per tile.
    """

    start: int
    length: int
    tile: int

    @property
    def parts(self) -> int:
        """The number of sub-tiles of a tile along this axis."""
        counts = range(SPLIT, 1, -1)
        return next((n for n in counts if self.tile % n == 0 and self.tile >= n * MIN_SUB_TILE), 1)

    def count(self, width: int) -> int:
        """Return the number of cells of ``width`` indices."""
        return -(-self.length // width)

    def cells(self, cell: Tensor, width: int, evaluator: MaskEvaluator) -> Interval:
        """Return the index as an interval in cells of ``width``, at most the last cell's."""
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
        """Return the index as an interval in every cell of ``width``, along one grid dimension.

        Args:
            numbers: The integers from 0 to past the last cell.
            width: Indices per cell.
            dim: One of the four dimensions of the grid.
            evaluator: Applies operations to the interval.
        """
        count = self.count(width)
        shape = [1, 1, 1, 1]
        shape[dim] = count
        # First and last index of each cell, as a view of ``numbers``. A CPU reads a contiguous
        # copy faster; a GPU saves a launch without it.
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
        """Return the indices at offset ``step`` in tiles; past the end, the last index."""
        index = torch.add(step, tile, alpha=self.tile)
        if self.length % self.tile:
            index = index.clamp(max=self.length - 1)
        if self.start:
            index = index + self.start
        return exact_index(index, self.length, evaluator, self.start)


@dataclass(frozen=True, slots=True)
class MaskShape:
    """The extent of a mask, and the memory limit of its evaluation."""

    B: int
    H: int
    q: Axis
    kv: Axis
    device: torch.device
    memory_bytes: int

    def grid(self, scale: int = 1) -> tuple[int, int]:
        """Return the number of rows and of columns of cells of ``scale`` tiles a side."""
        return self.q.count(self.q.tile * scale), self.kv.count(self.kv.tile * scale)


@dataclass(frozen=True, slots=True)
class TileStates:
    """The states of all tiles.

    Attributes:
        states: EMPTY, PARTIAL or FULL, ``(B or 1, H or 1, rows, columns)`` uint8; the first two
            sizes are 1 if the mask depends on neither batch row nor head.
        decided: A `Decided` for each tile, in the same shape, if recorded.
    """

    states: Tensor
    decided: Tensor | None
