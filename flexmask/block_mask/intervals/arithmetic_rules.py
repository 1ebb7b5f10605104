"""Interval rules of arithmetic, rounding and `torch.where`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from flexmask.block_mask.intervals.interval import Bounds, Ends, Interval
from flexmask.block_mask.intervals.interval_rule import (
    ANY_INTEGER,
    Rule,
    corner_bounds,
    corners,
    is_float,
    spanned,
)

# Arithmetic. Rounding is monotone, so the ends are right for floats too.


def _add(a: Interval, b: Interval) -> Ends:
    return a.ends + b.ends


def _add_bounds(a: Bounds, b: Bounds) -> Bounds:
    return a[0] + b[0], a[1] + b[1]


def _sub(a: Interval, b: Interval) -> Ends:
    return a.ends - b.flipped


def _sub_bounds(a: Bounds, b: Bounds) -> Bounds:
    return a[0] - b[1], a[1] - b[0]


def _is_positive(value: Interval) -> bool:
    return value.bounds[0] > 0


_mul_corners = corners(operator.mul)


def _mul(a: Interval, b: Interval) -> Ends:
    known_a, known_b = a.known_bounds, b.known_bounds
    if known_a is not None and known_b is not None and known_a[0] >= 0 and known_b[0] >= 0:
        return a.ends * b.ends
    return _mul_corners(a, b)


def _divide_by_sign(op: Callable[[Any, Any], Any]) -> Callable[[Interval, Interval], Ends | None]:
    """Return the ends of a division whose divisor is not zero and has one sign."""
    at_corners = corners(op)

    def ends(a: Interval, b: Interval) -> Ends | None:
        if not (b.bounds[0] > 0 or b.bounds[1] < 0):
            return None
        if b.is_exact and b.bounds[0] > 0:
            return cast(Ends, op(a.ends, b.ends))
        return at_corners(a, b)

    return ends


def _floor_divide(a: Interval, b: Interval) -> Ends | None:
    return None if is_float(a, b) else _floor_divide_integers(a, b)


_floor_divide_integers = _divide_by_sign(operator.floordiv)
_true_divide = _divide_by_sign(operator.truediv)


def _floor_divide_bounds(a: Bounds, b: Bounds) -> Bounds | None:
    return None if b[0] <= 0 <= b[1] else corner_bounds(operator.floordiv)(a, b)


def _truncate_divide(a: Any, b: Any) -> Any:
    return torch.div(a, b, rounding_mode="trunc")


def _divide(a: Interval, b: Interval, rounding_mode: str | None = None) -> Ends | None:
    if rounding_mode is None:
        return _true_divide(a, b)
    if is_float(a, b):
        return None
    if rounding_mode == "floor":
        return _floor_divide_integers(a, b)
    return _divide_by_sign(_truncate_divide)(a, b)


def _divide_bounds(a: Bounds, b: Bounds) -> Bounds:
    reach = max(abs(a[0]), abs(a[1]))
    return -reach, reach


def _remainder(a: Interval, m: Interval) -> Ends | None:
    """Return the ends of ``a % m`` for a positive m, which is monotone within one quotient."""
    if is_float(a, m) or not _is_positive(m):
        return None
    if not m.is_exact:
        largest = (m.hi - 1).to(torch.result_type(a.ends, m.ends))
        return torch.stack((torch.zeros_like(largest), largest))
    quotient_lo, quotient_hi = (a.ends // m.ends).unbind()
    lo, hi = (a.ends % m.ends).unbind()
    same_quotient = quotient_lo == quotient_hi
    return torch.stack(
        (torch.where(same_quotient, lo, 0), torch.where(same_quotient, hi, m.ends - 1))
    )


def _remainder_bounds(a: Bounds, m: Bounds) -> Bounds | None:
    if m[0] > 0:
        return 0, min(m[1] - 1, a[1]) if a[0] >= 0 else m[1] - 1
    return (m[0] + 1, 0) if m[1] < 0 else None


def _truncated_remainder(a: Interval, m: Interval) -> Ends | None:
    """Return the ends of fmod, which equals ``%`` for numbers that are not negative."""
    return None if is_float(a, m) or a.bounds[0] < 0 else _remainder(a, m)


def _negate(a: Interval) -> Ends:
    return -a.flipped


def _negate_bounds(a: Bounds) -> Bounds:
    return -a[1], -a[0]


def _absolute(a: Interval) -> Ends:
    if not is_float(a) and a.bounds[0] >= 0:
        return a.ends
    return torch.maximum(a.ends, -a.flipped).clamp(min=0)


def _absolute_bounds(a: Bounds) -> Bounds:
    reach = max(abs(a[0]), abs(a[1]))
    return (0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))), reach


def _power(base: Interval, exponent: Interval) -> Ends | None:
    if is_float(base, exponent) or exponent.bounds[0] < 0:
        return None
    if base.bounds[0] >= 1 or (base.bounds[0] >= 0 and exponent.bounds[0] >= 1):
        return base.ends**exponent.ends
    power = exponent.bounds[0]
    if power != exponent.bounds[1] or power == 0:
        return None
    if power % 2:
        return base.ends**power
    return _absolute(base) ** power


def _power_bounds(base: Bounds, exponent: Bounds) -> Bounds:
    if exponent[0] < 0 or exponent[1] > 64:
        return ANY_INTEGER
    reach = max(abs(base[0]), abs(base[1])) ** exponent[1]
    return (-reach if base[0] < 0 else 0), max(reach, 1)


def _square(a: Interval) -> Ends:
    return _absolute(a).square()


def _square_bounds(a: Bounds) -> Bounds:
    return 0, max(abs(a[0]), abs(a[1])) ** 2


# torch.where.


def _minimum(a: Interval, b: Interval) -> Ends:
    return torch.minimum(a.ends, b.ends)


def _minimum_bounds(a: Bounds, b: Bounds) -> Bounds:
    return min(a[0], b[0]), min(a[1], b[1])


def _maximum(a: Interval, b: Interval) -> Ends:
    return torch.maximum(a.ends, b.ends)


def _maximum_bounds(a: Bounds, b: Bounds) -> Bounds:
    return max(a[0], b[0]), max(a[1], b[1])


def _clamp(a: Interval, min: Interval | None = None, max: Interval | None = None) -> Ends:
    limits = (None if limit is None else limit.ends for limit in (min, max))
    return torch.clamp(a.ends, *limits)


def _clamp_bounds(a: Bounds, min: Bounds | None = None, max: Bounds | None = None) -> Bounds:
    if min is not None:
        a = _maximum_bounds(a, min)
    return a if max is None else _minimum_bounds(a, max)


def _where(condition: Interval, x: Interval, y: Interval) -> Ends | None:
    if not isinstance(condition.ends, Tensor) or condition.dtype != torch.bool:
        return None
    if condition.is_exact:
        return torch.where(condition.ends, x.ends, y.ends)
    # In cells with a decided condition both choices are the same; in others they are x and y.
    return spanned(
        torch.where(condition.ends, x.lo, y.lo), torch.where(condition.ends, x.hi, y.hi)
    )


def _where_bounds(condition: Bounds, x: Bounds, y: Bounds) -> Bounds:
    return min(x[0], y[0]), max(x[1], y[1])


def _monotone(name: str) -> Rule:
    def ends(a: Interval) -> Ends:
        return cast(Ends, getattr(torch, name)(a.ends))

    return Rule(ends)


def _sign(a: Interval) -> Ends | None:
    # torch.sign(NaN) is 0, which would drop the NaN ends of a float that may be anything.
    return None if is_float(a) else torch.sign(a.ends)


ARITHMETIC = {
    "add __add__ __radd__": Rule(_add, _add_bounds, promotes=True, shift=1),
    "sub subtract __sub__": Rule(_sub, _sub_bounds, promotes=True, shift=-1, by_difference=True),
    "mul multiply __mul__ __rmul__": Rule(_mul, corner_bounds(operator.mul), promotes=True),
    "floor_divide floordiv __floordiv__": Rule(_floor_divide, _floor_divide_bounds, promotes=True),
    "div divide true_divide truediv __truediv__": Rule(
        _divide, _divide_bounds, promotes=True, keywords=frozenset({"rounding_mode"})
    ),
    "remainder mod __mod__": Rule(_remainder, _remainder_bounds, promotes=True),
    "fmod": Rule(_truncated_remainder, promotes=True),
    "neg negative __neg__": Rule(_negate, _negate_bounds),
    "abs absolute __abs__": Rule(_absolute, _absolute_bounds),
    "pow __pow__": Rule(_power, _power_bounds, promotes=True),
    "square": Rule(_square, _square_bounds),
    "minimum": Rule(_minimum, _minimum_bounds, promotes=True),
    "maximum": Rule(_maximum, _maximum_bounds, promotes=True),
    "clamp clip": Rule(_clamp, _clamp_bounds, keywords=frozenset({"min", "max"})),
    "clamp_min": Rule(lambda a, min: _clamp(a, min), _maximum_bounds),
    "clamp_max": Rule(lambda a, max: _clamp(a, None, max), _minimum_bounds),
    "floor": _monotone("floor"),
    "ceil": _monotone("ceil"),
    "trunc fix": _monotone("trunc"),
    "round": _monotone("round"),
    "sign": Rule(_sign),
    "positive pos __pos__ clone detach contiguous": Rule(lambda a: a.ends, lambda a: a),
}
"""The rules by name, for torch functions, Tensor methods and Python operators of that name."""

WHERE = Rule(_where, _where_bounds)
"""The rule of torch.where; Tensor.where has another order of arguments."""
