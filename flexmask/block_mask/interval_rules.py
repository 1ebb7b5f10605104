"""Interval arithmetic: given bounds of the operands, what are bounds of the result?

A rule applies torch's own operation to the ends of its operands, so that promotion and rounding
are torch's. Integers that may wrap around are caught by `Rule.bounds`, in Python numbers. A rule
that has nothing certain to say returns None.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from flexmask.block_mask.intervals import Bounds, Ends, Interval, NoIntervalRule, Span

ANY_INTEGER: Bounds = (-(2**200), 2**200)
"""Bounds of a result too large to work out: it fits no dtype."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How one operation acts on intervals.

    Attributes:
        ends: Operands, and keywords of the operation, to the ends of the result; None if nothing
            can be said.
        bounds: Bounds of the operands, None for an absent one, to bounds of the result in
            Python integers. Where they do not fit the result's dtype, the result may wrap around.
        promotes: Whether torch.vmap promotes a 0-d tensor as it does under the operation on
            scalars: ``int8[q_idx] + int32_scalar`` is int32, as opposed to comparisons, which
            compare in int8.
        keywords: Keywords that ``ends`` understands.
        shift: 1 or -1 where a constant second operand moves an index up or down.
    """

    ends: Callable[..., Ends | None]
    bounds: Callable[..., Bounds | None] | None = None
    promotes: bool = False
    keywords: frozenset[str] = frozenset()
    shift: int = 0

    def shifted_span(self, operands: Sequence[Interval]) -> Span | None:
        """Return the index range behind ``q_idx + 3``: known, as long as 3 is one number."""
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
    """Whether an integer dtype holds all numbers within ``bounds``."""
    limits = torch.iinfo(dtype)
    return limits.min <= bounds[0] and bounds[1] <= limits.max


def finite_ends(ends: Ends) -> Ends:
    """Forget float ends that are not finite: between them, inf - inf may give NaN."""
    return torch.where(torch.isfinite(ends).all(0), ends, torch.nan)


def full_ends(dtype: torch.dtype, shape: torch.Size, device: torch.device) -> Ends:
    """Ends that hold whatever a dtype holds.

    Raises:
        NoIntervalRule: If the dtype is none that masks use.
    """
    if dtype == torch.bool:
        limits: tuple[float, float] = (False, True)
    elif dtype.is_floating_point:
        limits = (torch.nan, torch.nan)
    elif dtype in INTEGERS:
        limits = (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    else:
        raise NoIntervalRule(str(dtype))
    ends = [torch.full((), end, dtype=dtype, device=device).expand(shape) for end in limits]
    return torch.stack(ends)


INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def cast_ends(value: Interval, dtype: torch.dtype) -> Ends | None:
    """Ends of ``value.to(dtype)``."""
    source = value.dtype
    if dtype == torch.bool:
        return _nonzero(value)
    if dtype in INTEGERS and source != torch.bool and not fits(value.bounds, dtype):
        return None
    return value.ends.to(dtype)


# Arithmetic. Ends of a sum, a product and so on: rounding is monotone, so this holds for floats.


def _add(a: Interval, b: Interval) -> Ends:
    return a.ends + b.ends


def _add_bounds(a: Bounds, b: Bounds) -> Bounds:
    return a[0] + b[0], a[1] + b[1]


def _sub(a: Interval, b: Interval) -> Ends:
    return a.ends - b.flipped


def _sub_bounds(a: Bounds, b: Bounds) -> Bounds:
    return a[0] - b[1], a[1] - b[0]


def _corners(op: Callable[[Any, Any], Any]) -> Callable[[Interval, Interval], Ends]:
    """Ends of an operation that is monotone in each operand, in whatever direction."""

    def ends(a: Interval, b: Interval) -> Ends:
        straight = op(a.ends, b.ends)
        if a.is_exact or b.is_exact:
            return _spanned(straight, straight)
        crossed = op(a.ends, b.flipped)
        return _spanned(torch.minimum(straight, crossed), torch.maximum(straight, crossed))

    return ends


def _spanned(low: Ends, high: Ends) -> Ends:
    """Ends of what lies between the smaller of two low numbers and the larger of two high ones."""
    return torch.stack((torch.minimum(*low.unbind()), torch.maximum(*high.unbind())))


def _corner_bounds(op: Callable[[int, int], int]) -> Callable[[Bounds, Bounds], Bounds]:
    def bounds(a: Bounds, b: Bounds) -> Bounds:
        corners = [op(x, y) for x in a for y in b]
        return min(corners), max(corners)

    return bounds


def _is_positive(value: Interval) -> bool:
    return value.bounds[0] > 0


_mul_corners = _corners(operator.mul)


def _mul(a: Interval, b: Interval) -> Ends:
    known_a, known_b = a.known_bounds, b.known_bounds
    if known_a is not None and known_b is not None and known_a[0] >= 0 and known_b[0] >= 0:
        return a.ends * b.ends
    return _mul_corners(a, b)


def _divide_by_sign(op: Callable[[Any, Any], Any]) -> Callable[[Interval, Interval], Ends | None]:
    """Ends of a division whose divisor keeps its sign, zero excluded."""
    corners = _corners(op)

    def ends(a: Interval, b: Interval) -> Ends | None:
        if not (b.bounds[0] > 0 or b.bounds[1] < 0):
            return None
        if b.is_exact and b.bounds[0] > 0:
            return cast(Ends, op(a.ends, b.ends))
        return corners(a, b)

    return ends


def _floor_divide(a: Interval, b: Interval) -> Ends | None:
    return None if _is_float(a, b) else _floor_divide_integers(a, b)


_floor_divide_integers = _divide_by_sign(operator.floordiv)
_true_divide = _divide_by_sign(operator.truediv)


def _floor_divide_bounds(a: Bounds, b: Bounds) -> Bounds | None:
    return None if b[0] <= 0 <= b[1] else _corner_bounds(operator.floordiv)(a, b)


def _truncate_divide(a: Any, b: Any) -> Any:
    return torch.div(a, b, rounding_mode="trunc")


def _divide(a: Interval, b: Interval, rounding_mode: str | None = None) -> Ends | None:
    if rounding_mode is None:
        return _true_divide(a, b)
    if _is_float(a, b):
        return None
    if rounding_mode == "floor":
        return _floor_divide_integers(a, b)
    return _divide_by_sign(_truncate_divide)(a, b)


def _divide_bounds(a: Bounds, b: Bounds) -> Bounds:
    reach = max(abs(a[0]), abs(a[1]))
    return -reach, reach


def _remainder(a: Interval, m: Interval) -> Ends | None:
    """Ends of ``a % m`` for a positive m: within one quotient it is monotone."""
    if _is_float(a, m) or not _is_positive(m):
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
    """Ends of fmod, which is ``%`` where nothing is negative."""
    return None if _is_float(a, m) or a.bounds[0] < 0 else _remainder(a, m)


def _negate(a: Interval) -> Ends:
    return -a.flipped


def _negate_bounds(a: Bounds) -> Bounds:
    return -a[1], -a[0]


def _absolute(a: Interval) -> Ends:
    if not _is_float(a) and a.bounds[0] >= 0:
        return a.ends
    return torch.maximum(a.ends, -a.flipped).clamp(min=0)


def _absolute_bounds(a: Bounds) -> Bounds:
    reach = max(abs(a[0]), abs(a[1]))
    return (0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))), reach


def _power(base: Interval, exponent: Interval) -> Ends | None:
    if _is_float(base, exponent) or exponent.bounds[0] < 0:
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


# Comparisons and logic: surely true, possibly true. Floats may be NaN: possible is what is not
# surely otherwise.


def _is_float(*values: Interval) -> bool:
    ends = (value.ends for value in values)
    return any(
        e.is_floating_point() if isinstance(e, Tensor) else isinstance(e, float) for e in ends
    )


def _less(a: Interval, b: Interval) -> Ends:
    if _is_float(a, b):
        return torch.stack((a.hi < b.lo, ~(a.lo >= b.hi)))
    return a.flipped < b.ends


def _less_equal(a: Interval, b: Interval) -> Ends:
    if _is_float(a, b):
        return torch.stack((a.hi <= b.lo, ~(a.lo > b.hi)))
    return a.flipped <= b.ends


def _equal(a: Interval, b: Interval) -> Ends:
    if _is_float(a, b):
        surely = (a.hi <= b.lo) & (a.lo >= b.hi)
        return torch.stack((surely, ~((a.lo > b.hi) | (a.hi < b.lo))))
    return (a.flipped <= b.ends) & (a.ends >= b.flipped)


def _not_equal(a: Interval, b: Interval) -> Ends:
    return _negated(_equal(a, b))


def _negated(ends: Ends) -> Ends:
    return ~ends.flip(0)


def _nonzero(a: Interval) -> Ends:
    if a.dtype == torch.bool:
        return a.ends
    if a.is_exact:
        return a.ends != 0
    surely = (a.lo > 0) | (a.hi < 0)
    return torch.stack((surely, ~((a.lo == 0) & (a.hi == 0))))


def _truth(a: Interval) -> Any:
    """Ends of ``a != 0``; ``a`` may be a Python number."""
    return _nonzero(a) if isinstance(a.ends, Tensor) else bool(a.ends)


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
    return _negated(_nonzero(a))


# Bits of integers. On bools they are the logical operations.


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
    """Ends of a bitwise operation: bits above the first one that varies are known.

    In 12–14 (``1100``–``1110``) the two upper bits never change, so ``x ^ 5`` has the upper bits
    of ``12 ^ 5 = 1001`` and anything below: 8–11.
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
    if not isinstance(value.ends, Tensor) or value.dtype not in INTEGERS or _is_float(amount):
        return False
    return 0 <= amount.bounds[0] and amount.bounds[1] < torch.iinfo(value.dtype).bits - 1


def _shift_right(a: Interval, amount: Interval) -> Ends | None:
    if not _is_shift(amount, a):
        return None
    if amount.is_exact:
        return a.ends >> amount.ends
    return _corners(operator.rshift)(a, amount)


def _shift_left(a: Interval, amount: Interval) -> Ends | None:
    if not _is_shift(amount, a):
        return None
    if amount.is_exact:
        return a.ends << amount.ends
    return _corners(operator.lshift)(a, amount)


def _shift_left_bounds(a: Bounds, amount: Bounds) -> Bounds:
    if amount[0] < 0 or amount[1] > 64:
        return ANY_INTEGER
    return _corner_bounds(operator.lshift)(a, amount)


def _shift_right_bounds(a: Bounds, amount: Bounds) -> Bounds | None:
    return (min(a[0], 0), max(a[1], 0))


# Choice.


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
    # Where the condition is decided, both choices are the same; else they are x's and y's.
    return _spanned(
        torch.where(condition.ends, x.lo, y.lo), torch.where(condition.ends, x.hi, y.hi)
    )


def _where_bounds(condition: Bounds, x: Bounds, y: Bounds) -> Bounds:
    return min(x[0], y[0]), max(x[1], y[1])


def _monotone(name: str) -> Rule:
    def ends(a: Interval) -> Ends:
        return cast(Ends, getattr(torch, name)(a.ends))

    return Rule(ends)


def _sign(a: Interval) -> Ends | None:
    # torch.sign(NaN) is 0, so float ends that stand for anything would be lost.
    return None if _is_float(a) else torch.sign(a.ends)


def _named(names: str) -> set[Callable[..., Any]]:
    """Find the functions of torch, Tensor and operator that carry one of the names."""
    homes = (torch, torch.Tensor, operator)
    found = (getattr(home, name, None) for name in names.split() for home in homes)
    return {function for function in found if callable(function)}


def _rules() -> dict[Callable[..., Any], Rule]:
    add = Rule(_add, _add_bounds, promotes=True, shift=1)
    multiply = Rule(_mul, _corner_bounds(operator.mul), promotes=True)
    rounding = frozenset({"rounding_mode"})
    limits = frozenset({"min", "max"})
    table = {
        "add __add__ __radd__": add,
        "sub subtract __sub__": Rule(_sub, _sub_bounds, promotes=True, shift=-1),
        "mul multiply __mul__ __rmul__": multiply,
        "floor_divide floordiv __floordiv__": Rule(
            _floor_divide, _floor_divide_bounds, promotes=True
        ),
        "div divide true_divide truediv __truediv__": Rule(
            _divide, _divide_bounds, promotes=True, keywords=rounding
        ),
        "remainder mod __mod__": Rule(_remainder, _remainder_bounds, promotes=True),
        "fmod": Rule(_truncated_remainder, promotes=True),
        "neg negative __neg__": Rule(_negate, _negate_bounds),
        "abs absolute __abs__": Rule(_absolute, _absolute_bounds),
        "pow __pow__": Rule(_power, _power_bounds, promotes=True),
        "square": Rule(_square, _square_bounds),
        "lt less __lt__": Rule(_less),
        "le less_equal __le__": Rule(_less_equal),
        "gt greater __gt__": Rule(lambda a, b: _less(b, a)),
        "ge greater_equal __ge__": Rule(lambda a, b: _less_equal(b, a)),
        "eq __eq__": Rule(_equal),
        "ne not_equal __ne__": Rule(_not_equal),
        "logical_and": Rule(_logical_and),
        "logical_or": Rule(_logical_or),
        "logical_xor": Rule(_logical_xor),
        "logical_not": Rule(_logical_not),
        "bitwise_and and_ __and__ __rand__": Rule(
            _bitwise(operator.and_, _logical_and), promotes=True
        ),
        "bitwise_or or_ __or__ __ror__": Rule(_bitwise(operator.or_, _logical_or), promotes=True),
        "bitwise_xor xor __xor__ __rxor__": Rule(
            _bitwise(operator.xor, _logical_xor), promotes=True
        ),
        "bitwise_not invert __invert__": Rule(_bitwise_not),
        "bitwise_left_shift lshift __lshift__": Rule(
            _shift_left, _shift_left_bounds, promotes=True
        ),
        "bitwise_right_shift rshift __rshift__": Rule(
            _shift_right, _shift_right_bounds, promotes=True
        ),
        "minimum": Rule(_minimum, _minimum_bounds, promotes=True),
        "maximum": Rule(_maximum, _maximum_bounds, promotes=True),
        "clamp clip": Rule(_clamp, _clamp_bounds, keywords=limits),
        "clamp_min": Rule(lambda a, min: _clamp(a, min), _maximum_bounds),
        "clamp_max": Rule(lambda a, max: _clamp(a, None, max), _minimum_bounds),
        "floor": _monotone("floor"),
        "ceil": _monotone("ceil"),
        "trunc fix": _monotone("trunc"),
        "round": _monotone("round"),
        "sign": Rule(_sign),
        "positive pos __pos__ clone detach contiguous": Rule(lambda a: a.ends, lambda a: a),
    }
    rules = {function: rule for names, rule in table.items() for function in _named(names)}
    rules[torch.where] = Rule(_where, _where_bounds)
    return rules


RULES = _rules()
"""The rule of each torch function, Tensor method and Python operator that has one."""
