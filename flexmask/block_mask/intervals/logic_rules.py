"""Interval rules of comparisons, logic and bits."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from flexmask.block_mask.intervals.interval import Bounds, Ends, Interval
from flexmask.block_mask.intervals.interval_rule import (
    ANY_INTEGER,
    INTEGERS,
    Rule,
    corner_bounds,
    corners,
    is_float,
)

# Comparisons and logic. The ends are "certainly true" and "possibly true". Floats may be NaN, so
# "possibly" is the negation of "certainly not".


def _less(a: Interval, b: Interval) -> Ends:
    if is_float(a, b):
        return torch.stack((a.hi < b.lo, ~(a.lo >= b.hi)))
    return a.flipped < b.ends


def _less_equal(a: Interval, b: Interval) -> Ends:
    if is_float(a, b):
        return torch.stack((a.hi <= b.lo, ~(a.lo > b.hi)))
    return a.flipped <= b.ends


def _equal(a: Interval, b: Interval) -> Ends:
    if is_float(a, b):
        surely = (a.hi <= b.lo) & (a.lo >= b.hi)
        return torch.stack((surely, ~((a.lo > b.hi) | (a.hi < b.lo))))
    return (a.flipped <= b.ends) & (a.ends >= b.flipped)


def _not_equal(a: Interval, b: Interval) -> Ends:
    return _negated(_equal(a, b))


def _negated(ends: Ends) -> Ends:
    return ~ends.flip(0)


def nonzero(a: Interval) -> Ends:
    """Return the ends of ``a != 0``."""
    if a.dtype == torch.bool:
        return a.ends
    if a.is_exact:
        return a.ends != 0
    surely = (a.lo > 0) | (a.hi < 0)
    return torch.stack((surely, ~((a.lo == 0) & (a.hi == 0))))


def _truth(a: Interval) -> Any:
    """Return the ends of ``a != 0``; ``a`` may be a Python number."""
    return nonzero(a) if isinstance(a.ends, Tensor) else bool(a.ends)


def _logical_and(a: Interval, b: Interval) -> Ends:
    return cast(Ends, _truth(a) & _truth(b))


def _logical_or(a: Interval, b: Interval) -> Ends:
    return cast(Ends, _truth(a) | _truth(b))


def _logical_xor(a: Interval, b: Interval) -> Ends:
    (a_lo, a_hi), (b_lo, b_hi) = _split(_truth(a), a), _split(_truth(b), b)
    is_open = (a_lo ^ a_hi) | (b_lo ^ b_hi)
    return torch.stack(((a_lo ^ b_lo) & ~is_open, (a_lo ^ b_lo) | is_open))


def _split(truth: Any, a: Interval) -> tuple[Any, Any]:
    return (truth, truth) if a.is_exact else truth.unbind()


def _logical_not(a: Interval) -> Ends:
    return _negated(nonzero(a))


# Bitwise operations on integers. For bools they are the logical operations.


def _is_bool(value: Interval) -> bool:
    return isinstance(value.ends, bool) or (
        isinstance(value.ends, Tensor) and value.dtype == torch.bool
    )


def _bitwise(
    op: Callable[[Any, Any], Any], logical: Callable[[Interval, Interval], Ends]
) -> Callable[[Interval, Interval], Ends]:
    def ends(a: Interval, b: Interval) -> Ends:
        if _is_bool(a) and _is_bool(b):
            return logical(a, b)
        return _common_bits(op, a, b)

    return ends


def _common_bits(op: Callable[[Any, Any], Any], a: Interval, b: Interval) -> Ends:
    """Return the ends of a bitwise operation: the bits above the highest varying bit are known.

    In 12–14 (``1100``–``1110``) the two upper bits are constant, so ``x ^ 5`` has the upper bits
    of ``12 ^ 5 = 1001`` and arbitrary bits below: 8–11.
    """
    at_lo = op(a.lo, b.lo)
    varying = _smear((a.lo ^ a.hi) | (b.lo ^ b.hi)).to(at_lo.dtype)
    lo, hi = at_lo & ~varying, at_lo | varying
    if op is operator.and_:
        for side in (a, b):
            if side.bounds[0] >= 0:
                lo, hi = lo.clamp(min=0), torch.where(varying < 0, side.hi, hi)
                hi = torch.minimum(hi, torch.as_tensor(side.hi, device=hi.device).to(hi.dtype))
    if at_lo.dtype == torch.uint8:
        return torch.stack((lo, hi))
    limits = torch.iinfo(at_lo.dtype)
    sign_varies = lo > hi
    return torch.stack(
        (torch.where(sign_varies, limits.min, lo), torch.where(sign_varies, limits.max, hi))
    )


def _smear(x: Any) -> Tensor:
    """Set all bits below the highest set bit."""
    x = torch.as_tensor(x).to(torch.int64)
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | (x >> shift)
    return cast(Tensor, x)


def _bitwise_not(a: Interval) -> Ends:
    return ~a.flipped


def _is_shift(amount: Interval, value: Interval) -> bool:
    if not isinstance(value.ends, Tensor) or value.dtype not in INTEGERS or is_float(amount):
        return False
    return amount.bounds[0] >= 0 and amount.bounds[1] < torch.iinfo(value.dtype).bits - 1


def _shift_right(a: Interval, amount: Interval) -> Ends | None:
    if not _is_shift(amount, a):
        return None
    if amount.is_exact:
        return a.ends >> amount.ends
    return corners(operator.rshift)(a, amount)


def _shift_left(a: Interval, amount: Interval) -> Ends | None:
    if not _is_shift(amount, a):
        return None
    if amount.is_exact:
        return a.ends << amount.ends
    return corners(operator.lshift)(a, amount)


def _shift_left_bounds(a: Bounds, amount: Bounds) -> Bounds:
    if amount[0] < 0 or amount[1] > 64:
        return ANY_INTEGER
    return corner_bounds(operator.lshift)(a, amount)


def _shift_right_bounds(a: Bounds, amount: Bounds) -> Bounds | None:
    return (min(a[0], 0), max(a[1], 0))


LOGIC = {
    "lt less __lt__": Rule(_less, by_difference=True),
    "le less_equal __le__": Rule(_less_equal, by_difference=True),
    "gt greater __gt__": Rule(lambda a, b: _less(b, a), by_difference=True),
    "ge greater_equal __ge__": Rule(lambda a, b: _less_equal(b, a), by_difference=True),
    "eq __eq__": Rule(_equal, by_difference=True),
    "ne not_equal __ne__": Rule(_not_equal, by_difference=True),
    "logical_and": Rule(_logical_and),
    "logical_or": Rule(_logical_or),
    "logical_xor": Rule(_logical_xor),
    "logical_not": Rule(_logical_not),
    "bitwise_and and_ __and__ __rand__": Rule(
        _bitwise(operator.and_, _logical_and), promotes=True
    ),
    "bitwise_or or_ __or__ __ror__": Rule(_bitwise(operator.or_, _logical_or), promotes=True),
    "bitwise_xor xor __xor__ __rxor__": Rule(_bitwise(operator.xor, _logical_xor), promotes=True),
    "bitwise_not invert __invert__": Rule(_bitwise_not),
    "bitwise_left_shift lshift __lshift__": Rule(_shift_left, _shift_left_bounds, promotes=True),
    "bitwise_right_shift rshift __rshift__": Rule(
        _shift_right, _shift_right_bounds, promotes=True
    ),
}
"""The rules by name, for torch functions, Tensor methods and Python operators of that name."""
