"""Intervals: what is known of a value on every cell of a mask.

A *cell* is a rectangle of (query, key) pairs. Evaluating a mask_mod once on intervals instead of
numbers says for each cell whether the mask is surely true, surely false, or unknown there.

Both ends of an interval are one tensor, so that a rule takes few operations: ``q_idx + 3`` adds 3
to ``(2, *cells)`` numbers, and ``q_idx - kv_idx`` subtracts from them the opposite ones. They have
the dtype of the value they bound. A float interval with a NaN end holds anything, NaN included.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flexmask.block_mask.evaluator import MaskEvaluator

Ends = Tensor
"""Lower and upper ends, ``(2, *cells)``."""
Bounds = tuple[int, int]


class NoIntervalRule(Exception):
    """The mask_mod does something that intervals cannot follow; it must be evaluated exactly."""


@dataclass(frozen=True, slots=True)
class Span:
    """The indices behind an interval that is ``q_idx`` or ``kv_idx``, give or take a constant.

    Cell ``i`` covers ``start + i * width`` up to ``start + min((i + 1) * width, length)``,
    excluded. With start 0, width 4 and length 10 the cells are 0–3, 4–7 and 8–9.

    Attributes:
        cell: The cell number of each entry of the interval, shaped as its ends.
        start: Index of the first query or key.
        width: Indices per cell.
        length: Number of queries or keys; each one lies in some cell.
        is_whole: Whether ``cell`` counts from 0 to the last cell.
    """

    cell: Tensor
    start: int
    width: int
    length: int
    is_whole: bool = False


class Interval:
    """Lower and upper ends of one value in every cell; what a mask_mod gets as ``q_idx``.

    To the mask_mod it looks like a 0-d tensor. Python operators and torch functions on it go to
    the evaluator, which finds the rule.

    Attributes:
        ends: Lower and upper end in each cell, ``(2, *cells)``, in the dtype of the value. Of an
            exact value just the value, ``cells``; of a constant a 0-d tensor or a Python number.
        is_exact: Whether the value of each cell is known.
        evaluator: Who applies operations to it.
        span: The index range behind it, if it is an index.
    """

    __slots__ = ("_bounds", "_flipped", "ends", "evaluator", "is_exact", "span")
    __hash__ = object.__hash__

    def __init__(
        self,
        ends: Ends,
        evaluator: MaskEvaluator,
        *,
        is_exact: bool = False,
        bounds: Bounds | None = None,
        span: Span | None = None,
    ) -> None:
        """Hold the ends, and what Python knows of them."""
        self.ends = ends
        self.is_exact = is_exact
        self.evaluator = evaluator
        self.span = span
        self._bounds = bounds
        self._flipped: Ends | None = None

    @classmethod
    def of_triple(cls, triple: Tensor, evaluator: MaskEvaluator) -> Self:
        """Make one of lower, upper and again lower ends, ``(3, *cells)``.

        Ends and flipped ends are views of it, and nothing has to flip them later.
        """
        interval = cls(triple[:2], evaluator)
        interval._flipped = triple[1:]
        return interval

    def copied(self) -> Interval:
        """Make another one of the same ends, without the index range behind it."""
        twin = Interval(self.ends, self.evaluator, is_exact=self.is_exact, bounds=self._bounds)
        twin._flipped = self._flipped
        return twin

    @property
    def lo(self) -> Tensor:
        """Lower end in each cell."""
        return self.ends if self.is_exact else self.ends[0]

    @property
    def hi(self) -> Tensor:
        """Upper end in each cell."""
        return self.ends if self.is_exact else self.ends[1]

    @property
    def flipped(self) -> Ends:
        """Upper and lower ends, for what compares ends with opposite ends."""
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
        """Python numbers around all cells, read from the device where need be."""
        if self.known_bounds is None:
            self._bounds = self.evaluator.read_bounds(self.ends)
        return cast(Bounds, self.known_bounds)

    # What a 0-d tensor has, as far as masks use it.

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor."""
        return self.ends.dtype

    @property
    def device(self) -> torch.device:
        """As of a tensor."""
        return self.ends.device

    @property
    def shape(self) -> torch.Size:
        """As of the 0-d tensor it stands for."""
        return torch.Size(())

    @property
    def ndim(self) -> int:
        """As of the 0-d tensor it stands for."""
        return 0

    def dim(self) -> int:
        """As of the 0-d tensor it stands for."""
        return 0

    def size(self) -> torch.Size:
        """As of the 0-d tensor it stands for."""
        return torch.Size(())

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Find the tensor method ``name``; it goes through the evaluator."""
        method = getattr(torch.Tensor, name, None)
        if method is None or name.startswith("__"):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        if not callable(method):
            raise NoIntervalRule(f"Tensor.{name}")

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.evaluator.apply(method, (self, *args), kwargs)

        return call

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Mark the class as one that torch functions accept; the evaluator is a mode above."""
        raise NoIntervalRule(getattr(func, "__name__", str(func)))

    def __getitem__(self, index: Any) -> NoReturn:
        """Refuse: an index of an index is no pointwise expression."""
        raise NoIntervalRule("indexing an index")

    def __bool__(self) -> NoReturn:
        """Refuse `if` and `and`."""
        self.evaluator.refuse_host_read("`if`, `and`, `or` or `not` on a tensor")

    def __int__(self) -> NoReturn:
        """Refuse int()."""
        self.evaluator.refuse_host_read("int() of a tensor")

    def __float__(self) -> NoReturn:
        """Refuse float()."""
        self.evaluator.refuse_host_read("float() of a tensor")

    def __index__(self) -> NoReturn:
        """Refuse range() and the indexing of lists."""
        self.evaluator.refuse_host_read("a tensor as Python index")


def exact_index(index: Tensor, length: int, evaluator: MaskEvaluator, start: int = 0) -> Interval:
    """Return ``b``, ``h``, ``q_idx`` or ``kv_idx`` of ``length``, where it is known exactly."""
    bounds = (start, start + length - 1)
    span = Span(index, start, 1, length)
    return Interval(index, evaluator, is_exact=True, bounds=bounds, span=span)


def _install_operators() -> None:
    binary = "add sub mul truediv floordiv mod pow and_ or_ xor lshift rshift".split()

    def install(name: str, method: Callable[..., Any]) -> None:
        setattr(Interval, f"__{name.rstrip('_')}__", method)

    def forward(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: self.evaluator.apply(op, (self, other), {})

    def reflected(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: self.evaluator.apply(op, (other, self), {})

    def in_place(op: Callable[..., Any]) -> Callable[..., Any]:
        def update(self: Interval, other: Any) -> Interval:
            result = self.evaluator.apply(op, (self, other), {})
            if result.dtype != self.dtype:
                raise NoIntervalRule(f"in-place {op.__name__} that changes the dtype")
            for name in Interval.__slots__:
                setattr(self, name, getattr(result, name))
            return self

        return update

    for name in binary:
        op = getattr(operator, name)
        install(name, forward(op))
        install(f"r{name}", reflected(op))
        install(f"i{name}", in_place(op))
    for name in "lt le eq ne ge gt".split():
        install(name, forward(getattr(operator, name)))
    for name in "neg pos abs invert".split():
        op = getattr(operator, name)
        install(name, lambda self, op=op: self.evaluator.apply(op, (self,), {}))


_install_operators()
