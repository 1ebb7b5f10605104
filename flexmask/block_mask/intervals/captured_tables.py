"""Bounds of captured tensors: the values of ``table[q_idx]`` if ``q_idx`` is an interval."""

from __future__ import annotations

import functools
import itertools
import numbers
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexmask.block_mask.intervals.interval import Interval
from flexmask.block_mask.intervals.interval_rule import COMMON
from flexmask.block_mask.intervals.stand_in import Evaluator, NoIntervalRule, StandIn

POOLED_ENTRIES = 2**18
"""A table that is indexed by arbitrary ranges is first pooled to about this many entries."""

NUMPY_DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
"""Dtypes whose extrema NumPy finds."""


class Selection(StandIn):
    """A captured tensor with some dimensions indexed, such as ``table[b]`` in ``table[b][q]``.

    Attributes:
        table: The captured tensor.
        indices: The index of each dimension; None for those that are not indexed yet.
        casts: Dtypes to which the selected entries are cast, in this order.
    """

    __slots__ = ("casts", "indices", "table")

    def __init__(
        self,
        evaluator: Evaluator,
        table: Tensor,
        indices: Sequence[Any] | None = None,
        casts: tuple[torch.dtype, ...] = (),
    ) -> None:
        """Select from ``table``, without indices unless some are given."""
        self.evaluator = evaluator
        self.table = table
        self.indices = [None] * table.dim() if indices is None else list(indices)
        self.casts = casts

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor."""
        return (self.table.dtype, *self.casts)[-1]

    @property
    def shape(self) -> torch.Size:
        """Sizes of the dimensions that are not indexed."""
        lengths = zip(self.table.shape, self.indices, strict=True)
        return torch.Size([length for length, index in lengths if index is None])

    @property
    def cells(self) -> torch.Size:
        """Shape of the cells that the selection depends on."""
        given = (x.cells for x in self.indices if isinstance(x, Interval))
        cells: torch.Size = torch.broadcast_shapes(*given)
        return cells

    def cast_to(self, dtype: torch.dtype) -> Selection:
        """Return the selection with its entries cast."""
        return Selection(self.evaluator, self.table, self.indices, (*self.casts, dtype))

    def indexed(self, index: Any) -> Selection | None:
        """Return the selection with further dimensions indexed.

        Returns None if an index is neither a number nor ``:`` nor ``...``, or there are too many.
        """
        items = index if isinstance(index, tuple) else (index,)
        free = [dim for dim, x in enumerate(self.indices) if x is None]
        at = next((i for i, x in enumerate(items) if x is Ellipsis), None)
        if at is not None:
            skipped = [slice(None)] * (len(free) - len(items) + 1)
            items = (*items[:at], *skipped, *items[at + 1 :])
        if len(items) > len(free):
            return None
        indices = list(self.indices)
        for dim, item in zip(free, items, strict=False):
            if isinstance(item, slice) and item == slice(None):
                continue
            if not _is_number(item):
                return None
            indices[dim] = item
        return Selection(self.evaluator, self.table, indices, self.casts)


def _is_number(item: Any) -> bool:
    if isinstance(item, Tensor | StandIn):
        return item.dim() == 0
    return isinstance(item, numbers.Integral) and not isinstance(item, bool)


@dataclass(frozen=True, slots=True)
class CellScale:
    """A dimension pooled to the cells of ``q_idx`` or ``kv_idx``: see `intervals.Span`."""

    start: int
    width: int
    length: int
    wraps: bool


@dataclass(frozen=True, slots=True)
class RangeScale:
    """A dimension pooled by ``2**shift`` entries, with levels of power-of-two ranges on top."""

    shift: int
    wraps: bool


Pair = tuple[Tensor, Tensor]
"""The minima and maxima of a table."""

Position = tuple[Tensor, ...]
"""The position of an entry along one dimension: ``(index,)``, or ``(level, index)``."""

Scale = CellScale | RangeScale | None
"""The preparation of a dimension: for cells, for arbitrary ranges, or None for exact indices.

If it ``wraps``, some index is negative, and the dimension is repeated once, so that the range from
-1 to 3 is contiguous.
"""


class CapturedTables:
    """Minima and maxima of captured tensors over index ranges, cached for the build of one mask.

    A range that is a cell of ``q_idx`` or ``kv_idx`` is looked up in a table pooled to cells.
    Few ranges on a CPU are reduced one by one. Any other range is covered by two overlapping
    ranges whose length is a power of two. The minimum over the 7 entries 3–9 is the smaller of two
    entries of level 2, with ranges of 4::

        index          0  1  2  3  4  5  6  7  8  9
        level 2 at 3            └────────┘
        level 2 at 6                     └────────┘
    """

    def __init__(self) -> None:
        """Create an empty cache."""
        self._built: dict[tuple[object, ...], tuple[weakref.ref[Tensor], Tensor]] = {}

    def extrema(self, table: Tensor, indices: Sequence[Interval]) -> Tensor:
        """Bound ``table[indices]`` in each cell.

        Args:
            table: A captured tensor of as many dimensions as there are indices.
            indices: The index of each dimension, in range; negative ones count from the end.

        Returns:
            Minima, maxima and the minima again, ``(3, *cells)``, in the table's dtype, as for
            `Interval.of_triple`.

        Raises:
            NoIntervalRule: If torch cannot order numbers of the table's dtype.
        """
        scales = tuple(_scale(table, dim, index) for dim, index in enumerate(indices))
        reduced = _reduced_ranges(table, indices, scales)
        if reduced is not None:
            return reduced
        scaled = self._prepared(table, scales)
        if len(indices) == 1 and isinstance(scales[0], CellScale):
            span = indices[0].span
            assert span is not None
            if span.is_whole:
                return scaled.view(3, *span.cell.shape).to(table.dtype)
        positions: list[list[Any]] = [
            _positions(index, scale, length)
            for index, scale, length in zip(indices, scales, table.shape, strict=True)
        ]
        found = [
            scaled[:, *itertools.chain.from_iterable(entry)]
            for entry in itertools.product(*positions)
        ]
        if len(found) == 1:
            return found[0].to(table.dtype)
        lows, highs, _ = zip(*found, strict=True)
        low, high = functools.reduce(torch.minimum, lows), functools.reduce(torch.maximum, highs)
        return torch.stack((low, high, low)).to(table.dtype)

    def _prepared(self, table: Tensor, scales: tuple[Scale, ...]) -> Tensor:
        key = (id(table), *scales)
        built = self._built.get(key)
        if built is None or built[0]() is not table:
            # A mask_mod may create a table at every call; drop entries of tables that are gone.
            self._built = {key: x for key, x in self._built.items() if x[0]() is not None}
            built = self._built[key] = weakref.ref(table), _scaled(ordered(table), scales)
        return built[1]


def ordered(values: Tensor) -> Tensor:
    """Return the same numbers in a dtype for which torch finds extrema.

    Raises:
        NoIntervalRule: If there is no such dtype.
    """
    if values.dtype in COMMON:
        return values
    if values.dtype in (torch.uint16, torch.uint32):
        return values.to(torch.int64)
    if values.dtype.is_floating_point and values.dtype.itemsize == 1:
        return values.to(torch.float32)
    raise NoIntervalRule(f"a captured tensor of {values.dtype}")


def _scale(table: Tensor, dim: int, index: Interval) -> Scale:
    if index.is_exact:
        return None
    wraps = index.bounds[0] < 0
    if index.span is not None:
        start = index.span.start + (table.shape[dim] if wraps else 0)
        return CellScale(start, index.span.width, index.span.length, wraps)
    return RangeScale((table.numel() // POOLED_ENTRIES).bit_length(), wraps)


def _reduced_ranges(
    table: Tensor, indices: Sequence[Interval], scales: Sequence[Scale]
) -> Tensor | None:
    """Reduce the entries of each range, where that is less work than preparing the table.

    Returns:
        As `CapturedTables.extrema`; None where it is more work, or a dimension but the last one is
        indexed by ranges.
    """
    *others, last = scales
    if any(scale is not None for scale in others) or not isinstance(last, RangeScale):
        return None
    if last.wraps or table.is_cuda or table.dtype not in NUMPY_DTYPES:
        return None
    first, behind = indices[-1].lo.long(), indices[-1].hi.long() + 1
    num_levels = table.shape[-1].bit_length()
    lengths = behind - first
    shape = torch.broadcast_shapes(*(index.cells for index in indices))
    if int(lengths.expand(shape).sum()) > table.numel() * num_levels:
        return None
    start = torch.zeros((), dtype=torch.int64)
    for index, stride in zip(indices[:-1], table.contiguous().stride(), strict=False):
        start = start + index.ends.long() * stride
    starts = (start + first).expand(shape).reshape(-1)
    order = starts.argsort()  # so that what lies between two ranges is read once at most
    bounds = torch.stack((starts, starts + lengths.expand(shape).reshape(-1)), 1)[order]
    entries = table.contiguous().view(-1).numpy()
    entries = np.append(entries, entries[-1:])  # for a range that ends with the table
    found = torch.empty(3, len(starts), dtype=table.dtype)
    for place, extremum in ((0, np.minimum), (1, np.maximum)):
        reduced = extremum.reduceat(entries, bounds.view(-1).numpy())[::2]
        found[place, order] = torch.from_numpy(reduced)
    found[2] = found[0]
    return found.view(3, *shape)


def _scaled(table: Tensor, scales: Sequence[Scale]) -> Tensor:
    """Return minima, maxima and the minima again of a table prepared in each dimension."""
    lo = hi = table
    # From the last dimension to the first, because levels are inserted before their dimension.
    for dim in reversed(range(len(scales))):
        scale = scales[dim]
        if scale is None:
            continue
        if scale.wraps:
            lo, hi = _each(functools.partial(_doubled, dim=dim), lo, hi)
        if isinstance(scale, CellScale):
            lo, hi = _pooled(lo, hi, dim, scale.start, scale.length, scale.width)
        else:
            lo, hi = _pooled(lo, hi, dim, 0, lo.shape[dim], 1 << scale.shift)
            lo, hi = _levels(torch.minimum, lo, dim), _levels(torch.maximum, hi, dim)
    return torch.stack((lo, hi, lo))


def _pooled(lo: Tensor, hi: Tensor, dim: int, start: int, length: int, width: int) -> Pair:
    """Reduce ``width`` entries at a time, from ``start`` on; the last group may be shorter."""
    if width == 1:
        return _each(lambda table: table.narrow(dim, start, length), lo, hi)
    cells, rest = divmod(length, width)

    def whole(table: Tensor) -> Tensor:
        return table.narrow(dim, start, cells * width).unfold(dim, width, width)

    def tail(table: Tensor) -> Tensor:
        return table.narrow(dim, start + cells * width, rest).unsqueeze(dim).movedim(dim + 1, -1)

    parts = [_reduced(*_each(part, lo, hi)) for part, n in ((whole, cells), (tail, rest)) if n]
    if len(parts) == 1:
        return parts[0]
    lows, highs = zip(*parts, strict=True)
    return torch.cat(lows, dim), torch.cat(highs, dim)


def _each(change: Callable[[Tensor], Tensor], lo: Tensor, hi: Tensor) -> Pair:
    """Apply a function to minima and maxima; only once while both are the table itself."""
    changed = change(lo)
    return changed, changed if lo is hi else change(hi)


def _doubled(table: Tensor, dim: int) -> Tensor:
    return torch.cat((table, table), dim)


def _reduced(lo: Tensor, hi: Tensor) -> Pair:
    """Return the minima and maxima over the last dimension."""
    if lo is hi:
        # One pass for both; amin alone is slow for int64 on a CPU (torch 2.13).
        smallest, largest = torch.aminmax(lo, dim=-1)
        return smallest, largest
    return lo.amin(-1), hi.amax(-1)


def _levels(extremum: Callable[[Tensor, Tensor], Tensor], table: Tensor, dim: int) -> Tensor:
    """Stack the extrema of 1, 2, 4, … entries along a new dimension in front of ``dim``.

    Entry ``i`` of level ``k`` covers the entries from ``i`` to ``i + 2**k``, excluded; entries
    whose range passes the end are not used.
    """
    length = table.shape[dim]
    levels = [table]
    for level in range(length.bit_length() - 1):
        last, reach = levels[-1], 1 << level
        pairs = extremum(
            last.narrow(dim, 0, length - reach), last.narrow(dim, reach, length - reach)
        )
        levels.append(torch.cat((pairs, last.narrow(dim, length - reach, reach)), dim))
    return torch.stack(levels, dim)


def _positions(index: Interval, scale: Scale, length: int) -> list[Position]:
    """Return the positions of entries that together cover the index, along one dimension."""
    if scale is None:
        return [(index.lo,)]
    if isinstance(scale, CellScale):
        assert index.span is not None
        return [(index.span.cell,)]
    offset = length if scale.wraps else 0
    first = (index.lo.long() + offset) >> scale.shift
    last = (index.hi.long() + offset) >> scale.shift
    level = torch.frexp((last - first + 1).float()).exponent.long() - 1
    return [(level, first), (level, last + 1 - (torch.ones_like(level) << level))]
