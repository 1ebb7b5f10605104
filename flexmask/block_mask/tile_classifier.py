"""Finds which tiles of a mask are empty, partial and full, from coarse cells to fine ones.

1. The mask is divided into *cells* of 1, 8, 64, … tiles a side, and each cell is bounded by
   intervals. The size is the smallest for which the cells fit into one step.
2. Undecided cells are split 8 × 8, repeatedly, down to tiles.
3. In each tile that is still undecided, 4 × 4 pairs are evaluated: a true and a false one prove
   the tile partial. (If few tiles are left, all of their pairs are evaluated instead.)
4. The remaining tiles are split into sub-tiles and bounded by intervals again, and all pairs of
   undecided sub-tiles are evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flexmask.block_mask.intervals.evaluator import MaskEvaluator
from flexmask.block_mask.intervals.interval import Ends, exact_index
from flexmask.block_mask.intervals.stand_in import NoIntervalRule
from flexmask.block_mask.tile_states import (
    EMPTY,
    FULL,
    PARTIAL,
    SPLIT,
    Axis,
    Decided,
    MaskShape,
    TileStates,
)
from flexmask.mod_types import MaskMod

SAMPLES = 4
CELLS_AT_ONCE = {"cpu": 2**15, "cuda": 2**21}
"""Largest number of cells that are bounded at once; more cells are made coarser."""
PAIRS_AT_ONCE = {"cpu": 2**15, "cuda": 2**23}
"""Up to this many pairs, all are evaluated without samples and sub-tiles."""
BYTES_PER_PAIR = 32
"""Memory to evaluate one pair: a few int64 intermediates."""
BYTES_PER_CELL = 2 * BYTES_PER_PAIR
"""Memory to bound one cell: both ends of as many intermediates."""

Coordinates = tuple[Tensor, Tensor, Tensor, Tensor]
"""Batch row, head, tile row and tile column of cells, broadcastable to each other."""


class TileClassifier:
    """Classifies the tiles of one mask.

    Cells of a grid ``(B or 1, H or 1, rows, columns)`` are listed by their coordinates in
    row-major order, ``(N, 4)`` int64.
    """

    def __init__(
        self, mask_mod: MaskMod, shape: MaskShape, *, pointwise_only: bool = False
    ) -> None:
        """Prepare the evaluation of ``mask_mod``."""
        self._shape = shape
        self._evaluator = MaskEvaluator(mask_mod, shape.device, pointwise_only=pointwise_only)
        self._has_intervals = True
        self._scale = self._coarsest_scale()
        lengths = [
            axis.tile * self._scale * axis.count(axis.tile * self._scale)
            for axis in (shape.q, shape.kv)
        ]
        count = max(shape.B, shape.H, *lengths, SPLIT)
        self._numbers = torch.arange(count, device=shape.device)

    def classify(self, records: bool = False) -> TileStates:
        """Decide every tile.

        Args:
            records: Whether to record how each tile was decided.

        Raises:
            MaskError: If the mask_mod breaks a rule of FlexAttention.
        """
        try:
            states, undecided = self._bounded_tiles()
        except NoIntervalRule:
            self._has_intervals = False
            states, undecided = self._undecided_tiles()
        decided = torch.zeros_like(states) if records else None
        for tiles in self._chunks(undecided, SAMPLES * SAMPLES * BYTES_PER_PAIR):
            self._settle(tiles, states, decided)
        rows, columns = self._shape.grid()
        states = states[..., :rows, :columns]
        self._cap_at_edges(states)
        return TileStates(states, None if decided is None else decided[..., :rows, :columns])

    def allowed_pairs(self, states: Tensor) -> int:
        """Count the pairs that the mask allows.

        Args:
            states: The states that `classify` returned.
        """
        allowed = int((states == FULL).sum()) * self._shape.q.tile * self._shape.kv.tile
        for tiles in self._chunks((states == PARTIAL).nonzero(), SPLIT * SPLIT * BYTES_PER_CELL):
            allowed += self._allowed_in(_coordinates(tiles))
        copies = self._shape.B // states.shape[0] * (self._shape.H // states.shape[1])
        return allowed * copies

    def _chunks(self, entries: Tensor, bytes_each: int) -> Iterator[Tensor]:
        """Split a list into chunks within the memory limit, given the bytes of an entry."""
        size = max(1, self._shape.memory_bytes // bytes_each)
        if len(entries) > size:
            yield from entries.split(size)
        elif len(entries):
            yield entries

    # From coarse cells to tiles.

    def _bounded_tiles(self) -> tuple[Tensor, Tensor]:
        """Bound all tiles by intervals.

        Returns:
            The states in a grid that may extend past the tiles, and the undecided tiles.
        """
        scale = self._scale
        states = self._coarse_states(scale)
        undecided = (states == PARTIAL).nonzero()
        while scale > 1:
            scale //= SPLIT
            states, undecided = self._refined(states, undecided, scale)
        return states, undecided

    def _undecided_tiles(self) -> tuple[Tensor, Tensor]:
        shape = (self._shape.B, self._shape.H, *self._shape.grid())
        states = torch.full(shape, PARTIAL, dtype=torch.uint8, device=self._shape.device)
        return states, (states == PARTIAL).nonzero()

    def _coarsest_scale(self) -> int:
        """Return how many tiles the first cells have along a side."""
        limit = CELLS_AT_ONCE["cpu" if self._shape.device.type == "cpu" else "cuda"]
        limit = min(limit, self._shape.memory_bytes // BYTES_PER_CELL)
        masks = self._shape.B * self._shape.H
        scale = 1
        while (
            masks * math.prod(self._shape.grid(scale)) > limit and max(self._shape.grid(scale)) > 1
        ):
            scale *= SPLIT
        return scale

    def _coarse_states(self, scale: int) -> Tensor:
        shape, numbers, evaluator = self._shape, self._numbers, self._evaluator
        q_width, kv_width = shape.q.tile * scale, shape.kv.tile * scale
        ends = evaluator.interval_ends(
            exact_index(numbers[: shape.B].view(-1, 1, 1, 1), shape.B, evaluator),
            exact_index(numbers[: shape.H].view(1, -1, 1, 1), shape.H, evaluator),
            shape.q.all_cells(numbers, q_width, 2, evaluator),
            shape.kv.all_cells(numbers, kv_width, 3, evaluator),
        )
        # A result that depends on neither b nor h is stored once.
        return _states(ends).expand(-1, -1, *shape.grid(scale)).contiguous()

    def _refined(self, states: Tensor, cells: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """Split undecided cells; return the states of the smaller cells and the undecided ones."""
        split = self._numbers[:SPLIT]
        fine = states[:, :, :, None, :, None].expand(-1, -1, -1, SPLIT, -1, SPLIT).contiguous()
        fine = fine.view(*states.shape[:2], states.shape[2] * SPLIT, states.shape[3] * SPLIT)
        rows, columns = self._shape.grid(scale)
        tile = (self._shape.q.tile * scale, self._shape.kv.tile * scale)
        undecided = [cells[:0]]
        for chunk in self._chunks(cells, SPLIT * SPLIT * BYTES_PER_CELL):
            b, h, row, column = _coordinates(chunk)
            row = row * SPLIT + split[:, None]
            column = column * SPLIT + split
            smaller = _states(self._bounded((b, h, row, column), *tile))
            smaller = torch.where((row < rows) & (column < columns), smaller, EMPTY)
            fine[b, h, row, column] = smaller
            cell, *part = (smaller == PARTIAL).nonzero().unbind(1)
            b, h, row, column = chunk[cell].unbind(1)
            finer = (row * SPLIT + part[0], column * SPLIT + part[1])
            undecided.append(torch.stack((b, h, *finer), 1))
        return fine, torch.cat(undecided)

    def _bounded(self, cells: Coordinates, q_width: int, kv_width: int) -> Ends:
        """Bound the mask in cells of ``q_width × kv_width`` pairs."""
        b, h, row, column = cells
        evaluator = self._evaluator
        return evaluator.interval_ends(
            exact_index(b, self._shape.B, evaluator),
            exact_index(h, self._shape.H, evaluator),
            self._shape.q.cells(row, q_width, evaluator),
            self._shape.kv.cells(column, kv_width, evaluator),
        )

    def _cap_at_edges(self, states: Tensor) -> None:
        """Make full cells partial that extend past the last query or key, as torch does."""
        if self._shape.q.length % self._shape.q.tile:
            states[..., -1, :].clamp_(max=PARTIAL)
        if self._shape.kv.length % self._shape.kv.tile:
            states[..., -1].clamp_(max=PARTIAL)

    # Within tiles that intervals left undecided.

    def _settle(self, tiles: Tensor, states: Tensor, decided: Tensor | None) -> None:
        """Decide tiles, and write their states and how they were decided."""
        coordinates = _coordinates(tiles)
        if self._are_few(len(tiles)):
            states[tuple(tiles.unbind(1))] = _states_of_pairs(self._whole(coordinates))
            if decided is not None:
                decided[tuple(tiles.unbind(1))] = int(Decided.BY_PAIRS)
            return
        sampled = _states_of_pairs(self._sampled(coordinates))
        if decided is not None:
            decided[tuple(tiles.unbind(1))] = int(Decided.BY_SAMPLES)
        if self._evaluator.may_leave_tables:
            # Only evaluation shows whether an index is out of range.
            is_open = torch.arange(len(tiles), device=tiles.device)
        else:
            is_open = (sampled != PARTIAL).nonzero()[:, 0]
        for chunk in self._chunks(is_open, SPLIT * SPLIT * BYTES_PER_CELL):
            some = tiles[chunk]
            settled, how = self._settled_in_parts(_coordinates(some), sampled[chunk])
            states[tuple(some.unbind(1))] = settled
            if decided is not None:
                decided[tuple(some.unbind(1))] = how

    def _are_few(self, tiles: int) -> bool:
        """Return True if evaluating all pairs of the tiles is faster than excluding some first."""
        few = PAIRS_AT_ONCE["cpu" if self._shape.device.type == "cpu" else "cuda"]
        few = min(few, self._shape.memory_bytes // BYTES_PER_PAIR)
        return tiles * self._shape.q.tile * self._shape.kv.tile <= few

    def _whole(self, tiles: Coordinates) -> Tensor:
        """Evaluate all pairs of tiles; returns ``(N, queries, keys)``."""
        q_tile, kv_tile = self._shape.q.tile, self._shape.kv.tile
        return self._pairs(tiles, self._numbers[:q_tile], self._numbers[:kv_tile])

    def _sampled(self, tiles: Coordinates) -> Tensor:
        """Evaluate pairs at the ends of a tile and near its middle: ``(N, SAMPLES, SAMPLES)``."""
        place = self._numbers[:SAMPLES]
        lengths = (self._shape.q.tile, self._shape.kv.tile)
        q_step, kv_step = (place * (n - 1) // (SAMPLES - 1) for n in lengths)
        return self._pairs(tiles, q_step, kv_step)

    def _settled_in_parts(self, tiles: Coordinates, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """Decide tiles by sub-tiles, and by all pairs of undecided sub-tiles.

        Args:
            tiles: Coordinates of the tiles, ``(N, 1, 1)`` each.
            sampled: The states of their samples, ``(N,)``.

        Returns:
            The states, and how each was decided, ``(N,)`` uint8 each.
        """
        lo, hi = self._sub_tiles(tiles)
        has_true = _any(lo) | (sampled > EMPTY)
        has_false = ~_all(hi) | (sampled < FULL)
        is_open = hi & ~lo
        if not self._evaluator.may_leave_tables:
            is_open &= ~(has_true & has_false)[:, None, None]
        how = torch.where(_any(is_open), int(Decided.BY_PAIRS), int(Decided.BY_SUB_TILES))
        trues, falses = has_true.int(), has_false.int()
        for tile, mask, _ in self._open_pairs(tiles, is_open):
            trues.index_add_(0, tile, _any(mask).int())
            falses.index_add_(0, tile, 1 - _all(mask).int())
        return _states(torch.stack((falses == 0, trues > 0))), how.byte()

    def _sub_tiles(self, tiles: Coordinates) -> tuple[Tensor, Tensor]:
        """Return in which sub-tiles the mask is certainly true, and in which possibly.

        Returns:
            ``(N, parts of q, parts of kv)`` each.
        """
        b, h, row, column = tiles
        q, kv = self._shape.q, self._shape.kv
        shape = (len(row), q.parts, kv.parts)
        if not self._has_intervals:
            nowhere = torch.zeros(shape, dtype=torch.bool, device=row.device)
            return nowhere, ~nowhere
        row = row * q.parts + self._numbers[: q.parts, None]
        column = column * kv.parts + self._numbers[: kv.parts]
        widths = (q.tile // q.parts, kv.tile // kv.parts)
        lo, hi = self._bounded((b, h, row, column), *widths).expand(2, *shape)
        return lo, hi

    def _allowed_in(self, tiles: Coordinates) -> int:
        """Count the pairs that the mask allows in tiles."""
        lo, hi = self._sub_tiles(tiles)
        q, kv = self._shape.q, self._shape.kv
        _, _, row, column = tiles
        heights = _extents(row, q)[:, :, None]
        widths = _extents(column, kv)[:, None, :]
        allowed = int((lo * heights * widths).sum())
        for _, mask, is_within in self._open_pairs(tiles, hi & ~lo):
            allowed += int((mask & is_within).sum())
        return allowed

    def _open_pairs(
        self, tiles: Coordinates, is_open: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Evaluate all pairs of undecided sub-tiles, in chunks.

        Yields:
            For each sub-tile the index of its tile in ``tiles``, ``(M,)``; the mask of its pairs,
            ``(M, queries, keys)``; and which pairs are within the lengths. Pairs past an end
            repeat the last one.
        """
        q, kv = self._shape.q, self._shape.kv
        widths = (q.tile // q.parts, kv.tile // kv.parts)
        q_step, kv_step = (self._numbers[:width] for width in widths)
        for chunk in self._chunks(is_open.nonzero(), math.prod(widths) * BYTES_PER_PAIR):
            tile, q_part, kv_part = chunk.unbind(1)
            b, h, row, column = (x[tile] for x in tiles)
            q_steps = q_part[:, None] * widths[0] + q_step
            kv_steps = kv_part[:, None] * widths[1] + kv_step
            mask = self._pairs((b, h, row, column), q_steps, kv_steps)
            is_query = q_steps + row[:, 0] * q.tile < q.length
            is_key = kv_steps + column[:, 0] * kv.tile < kv.length
            yield tile, mask, is_query[:, :, None] & is_key[:, None, :]

    def _pairs(self, tiles: Coordinates, q_step: Tensor, kv_step: Tensor) -> Tensor:
        """Evaluate the pairs of queries and keys at given offsets within tiles.

        Args:
            tiles: Coordinates of the tiles, ``(N, 1, 1)`` each.
            q_step: ``(Q,)``, or ``(N, Q)``.
            kv_step: ``(K,)``, or ``(N, K)``.

        Returns:
            The mask, ``(N, Q, K)``.
        """
        b, h, row, column = tiles
        evaluator = self._evaluator
        return evaluator.pairs(
            exact_index(b, self._shape.B, evaluator),
            exact_index(h, self._shape.H, evaluator),
            self._shape.q.indices(row, q_step[..., :, None], evaluator),
            self._shape.kv.indices(column, kv_step[..., None, :], evaluator),
        )


def _extents(tile: Tensor, axis: Axis) -> Tensor:
    """Return how many indices of each sub-tile are within the length: ``(N, parts)``."""
    width = axis.tile // axis.parts
    start = tile.view(-1, 1) * axis.tile + torch.arange(axis.parts, device=tile.device) * width
    return (axis.length - start).clamp(0, width)


def _coordinates(cells: Tensor) -> Coordinates:
    """Return the coordinates of cells, ``(N, 1, 1)`` each."""
    b, h, row, column = cells.view(-1, 4, 1, 1).unbind(1)
    return b, h, row, column


def _states(ends: Ends) -> Tensor:
    """Return EMPTY, PARTIAL or FULL, given where a mask is certainly and possibly true."""
    return ends.view(torch.uint8).sum(0, dtype=torch.uint8)


def _states_of_pairs(mask: Tensor) -> Tensor:
    """Return EMPTY, PARTIAL or FULL for each entry of the first dimension."""
    smallest, largest = torch.aminmax(mask.flatten(1).view(torch.uint8), dim=1)
    return smallest + largest


# On a CPU, reductions of bytes are vectorised and those of bools are not (torch 2.13).


def _any(mask: Tensor) -> Tensor:
    """Return for each entry of the first dimension whether any of its pairs is true."""
    return mask.flatten(1).view(torch.uint8).amax(1).view(torch.bool)


def _all(mask: Tensor) -> Tensor:
    """Return for each entry of the first dimension whether all of its pairs are true."""
    return mask.flatten(1).view(torch.uint8).amin(1).view(torch.bool)
