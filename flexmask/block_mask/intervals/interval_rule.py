"""Rules of interval arithmetic: from the ends of the operands to the ends of the result.

A rule applies torch's own operation to the ends of its operands, so that promotion and rounding
are torch's. `Rule.bounds` detects integers that may wrap around, in Python numbers. A rule that
can conclude nothing returns None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexmask.block_mask.intervals.interval import Bounds, Ends, Interval, Span
from flexmask.block_mask.intervals.stand_in import NoIntervalRule

INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
COMMON = INTEGERS | FLOATS | {torch.bool}
"""Dtypes of arithmetic rules; torch has few operations for others."""

ANY_INTEGER: Bounds = (-(2**200), 2**200)
"""Bounds of a result that is too large to compute and fits into no dtype."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The effect of one operation on intervals.

    Attributes:
        ends: Computes the ends of the result from the operands and keywords of the operation;
            returns None if nothing can be concluded.
        bounds: Computes bounds of the result in Python integers from bounds of the operands (None
            for an absent one). If they do not fit the result's dtype, it may wrap around.
        promotes: Whether torch.vmap promotes a 0-d tensor as for scalars:
            ``int8[q_idx] + int32_scalar`` is int32, while comparisons compare in int8.
        keywords: The keywords that ``ends`` accepts.
        shift: 1 or -1 if a constant second operand moves an index up or down; else 0.
        by_difference: Whether the result of two integers follows from their difference.
    """

    ends: Callable[..., Ends | None]
    bounds: Callable[..., Bounds | None] | None = None
    promotes: bool = False
    keywords: frozenset[str] = frozenset()
    shift: int = 0
    by_difference: bool = False

    def shifted_span(self, operands: Sequence[Interval]) -> Span | None:
        """Return the indices of ``q_idx + 3``, which are known for a constant second operand."""
        if not self.shift:
            return None
        index, constant = operands
        if index.span is None and self.shift > 0:
            constant, index = operands
        offset = constant.known_bounds
        if index.span is None or offset is None or offset[0] != offset[1]:
            return None
        if isinstance(constant.ends, Tensor) and constant.ends.dim() > 0:
            return None
        return replace(index.span, start=index.span.start + self.shift * offset[0])


def fits(bounds: Bounds, dtype: torch.dtype) -> bool:
    """Return True if an integer dtype can hold all numbers within ``bounds``."""
    limits = torch.iinfo(dtype)
    return limits.min <= bounds[0] and bounds[1] <= limits.max


def finite_ends(ends: Ends) -> Ends:
    """Return float ends, NaN for both where one is not finite: inf - inf may be NaN."""
    return torch.where(torch.isfinite(ends).all(0), ends, torch.nan)


def full_ends(dtype: torch.dtype, shape: torch.Size, device: torch.device) -> Ends:
    """Return ends that contain every value of a dtype.

    Raises:
        NoIntervalRule: If the dtype is not a common one.
    """
    if dtype not in COMMON:
        raise NoIntervalRule(f"a value of {dtype}")
    if dtype == torch.bool:
        limits: tuple[float, float] = (False, True)
    elif dtype in FLOATS:
        limits = (torch.nan, torch.nan)
    else:
        limits = (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    ends = [torch.full((), end, dtype=dtype, device=device).expand(shape) for end in limits]
    return torch.stack(ends)


def corners(op: Callable[[Any, Any], Any]) -> Callable[[Interval, Interval], Ends]:
    """Return the ends of an operation that is monotone in each operand, in either direction."""

    def ends(a: Interval, b: Interval) -> Ends:
        straight = op(a.ends, b.ends)
        if a.is_exact or b.is_exact:
            return spanned(straight, straight)
        crossed = op(a.ends, b.flipped)
        return spanned(torch.minimum(straight, crossed), torch.maximum(straight, crossed))

    return ends


def spanned(low: Ends, high: Ends) -> Ends:
    """Return the smaller of two lower ends and the larger of two upper ends."""
    return torch.stack((torch.minimum(*low.unbind()), torch.maximum(*high.unbind())))


def corner_bounds(op: Callable[[int, int], int]) -> Callable[[Bounds, Bounds], Bounds]:
    """Return the bounds of an operation that is monotone in each operand, in either direction."""

    def bounds(a: Bounds, b: Bounds) -> Bounds:
        results = [op(x, y) for x in a for y in b]
        return min(results), max(results)

    return bounds


def is_float(*values: Interval) -> bool:
    """Return True if a value is a float."""
    ends = (value.ends for value in values)
    return any(
        e.is_floating_point() if isinstance(e, Tensor) else isinstance(e, float) for e in ends
    )
