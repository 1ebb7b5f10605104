"""Intervals: lower and upper ends of a value in each cell of a mask.

A *cell* is a rectangle of (query, key) pairs. Evaluating a mask_mod once on intervals instead of
numbers tells for each cell whether the mask is true everywhere, false everywhere, or undecided.

Both ends of an interval are one tensor, so that a rule takes few operations: ``q_idx + 3`` adds 3
to ``(2, *cells)`` numbers, and ``q_idx - kv_idx`` subtracts the opposite ends. They have the dtype
of the value that they bound. A float interval with a NaN end contains every value, NaN included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor

from flexmask.block_mask.intervals.stand_in import Evaluator, StandIn

Ends = Tensor
"""Lower and upper ends, ``(2, *cells)``."""
Bounds = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Span:
    """The indices of an interval that is ``q_idx`` or ``kv_idx``, up to an added constant.

    Cell ``i`` covers ``start + i * width`` up to ``start + min((i + 1) * width, length)``,
    excluded. With start 0, width 4 and length 10 the cells are 0–3, 4–7 and 8–9.

    Attributes:
        cell: The cell number of each entry of the interval, shaped as its ends.
        start: Index of the first query or key.
        width: Indices per cell.
        length: Number of queries or keys.
        is_whole: Whether ``cell`` is 0, 1, … up to the last cell.
    """

    cell: Tensor
    start: int
    width: int
    length: int
    is_whole: bool = False


class Interval(StandIn):
    """Lower and upper ends of one value in every cell; a mask_mod gets it as ``q_idx``.

    The mask_mod sees a 0-d tensor. Python operators and torch functions on it call the evaluator,
    which applies their rule (`stand_in.StandIn`).

    Attributes:
        ends: Lower and upper end in each cell, ``(2, *cells)``, in the dtype of the value. For an
            exact value the value itself, ``cells``; for a constant a 0-d tensor or a number.
        is_exact: Whether the value of each cell is known.
        evaluator: Applies operations to it.
        span: The indices that it covers, if it is an index.
    """

    __slots__ = ("_bounds", "_flipped", "ends", "is_exact", "span")

    def __init__(
        self,
        ends: Ends,
        evaluator: Evaluator,
        *,
        is_exact: bool = False,
        bounds: Bounds | None = None,
        span: Span | None = None,
    ) -> None:
        """Create an interval from its ends, with Python numbers around them if known."""
        self.ends = ends
        self.is_exact = is_exact
        self.evaluator = evaluator
        self.span = span
        self._bounds = bounds
        self._flipped: Ends | None = None

    @classmethod
    def of_triple(cls, triple: Tensor, evaluator: Evaluator) -> Self:
        """Create an interval from lower, upper and the lower ends again, ``(3, *cells)``.

        Ends and flipped ends are views of that tensor, so nothing flips them later.
        """
        interval = cls(triple[:2], evaluator)
        interval._flipped = triple[1:]
        return interval

    def copied(self) -> Interval:
        """Return an interval with the same ends and no ``span``."""
        twin = Interval(self.ends, self.evaluator, is_exact=self.is_exact, bounds=self._bounds)
        twin._flipped = self._flipped
        return twin

    @property
    def lo(self) -> Tensor:
        """The lower end in each cell."""
        return self.ends if self.is_exact else self.ends[0]

    @property
    def hi(self) -> Tensor:
        """The upper end in each cell."""
        return self.ends if self.is_exact else self.ends[1]

    @property
    def flipped(self) -> Ends:
        """The upper and then the lower ends, for rules that combine opposite ends."""
        if self._flipped is None:
            self._flipped = self.ends if self.is_exact else self.ends.flip(0)
        return self._flipped

    @property
    def known_bounds(self) -> Bounds | None:
        """Python numbers around all cells, if known without reading the device."""
        if self._bounds is None and self.ends.dtype == torch.bool:
            return (0, 1)
        return self._bounds

    @property
    def bounds(self) -> Bounds:
        """Python numbers around all cells, read from the device if necessary."""
        if self.known_bounds is None:
            self._bounds = self.evaluator.read_bounds(self.ends)
        return cast(Bounds, self.known_bounds)

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor."""
        return self.ends.dtype

    @property
    def shape(self) -> torch.Size:
        """As of a 0-d tensor."""
        return torch.Size(())

    @property
    def cells(self) -> torch.Size:
        """Shape of the cells that the value depends on."""
        return self.lo.shape


def exact_index(index: Tensor, length: int, evaluator: Evaluator, start: int = 0) -> Interval:
    """Return exact values of ``b``, ``h``, ``q_idx`` or ``kv_idx``, each less than ``length``."""
    bounds = (start, start + length - 1)
    span = Span(index, start, 1, length)
    return Interval(index, evaluator, is_exact=True, bounds=bounds, span=span)
