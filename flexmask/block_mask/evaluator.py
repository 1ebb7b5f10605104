"""Evaluation of a mask_mod: on intervals, and exactly on single (query, key) pairs."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flexmask.block_mask.captured_tables import CapturedTables, Selection
from flexmask.block_mask.interval_rule import INTEGERS, Rule, finite_ends, fits, full_ends
from flexmask.block_mask.intervals import Bounds, Ends, Interval, NoIntervalRule
from flexmask.block_mask.pairs_by_vmap import pairs_by_vmap
from flexmask.block_mask.rule_table import RULES, cast_ends
from flexmask.block_mask.rules import (
    EXTREMA,
    MaskMod,
    captured_name,
    check_pointwise,
    check_result,
    check_signature,
    functions_named,
    host_read_error,
    mask_name,
)
from flexmask.errors import MaskError

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A function of torch, its arguments and its keywords."""


CASTS: dict[Any, torch.dtype] = {
    Tensor.bool: torch.bool,
    Tensor.byte: torch.uint8,
    Tensor.char: torch.int8,
    Tensor.short: torch.int16,
    Tensor.int: torch.int32,
    Tensor.long: torch.int64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
}
FACTORIES = functions_named("zeros_like ones_like full_like new_zeros new_ones new_full")
INDEX_DTYPES = (torch.int64, torch.int32)


class MaskEvaluator(TorchFunctionMode):
    """Runs one mask_mod for one build, and sees every torch operation in it.

    Args:
        mask_mod: What to run.
        device: Where tensors live.
        reads_host: Whether values may be read from the device to settle what intervals cannot.

    Attributes:
        needs_vmap: Whether the mask_mod uses an operation that has no rule here, so that pairs
            must be evaluated through torch.vmap.
        tables: Extrema of the captured tensors.
        may_leave_tables: Whether some index may be out of its tensor's range, for all that
            intervals tell.
    """

    def __init__(self, mask_mod: MaskMod, device: torch.device, reads_host: bool = True) -> None:
        """Start with no tables."""
        super().__init__()
        self.needs_vmap = False
        self.may_leave_tables = False
        self._mask_mod = mask_mod
        self._device = device
        self._reads_host = reads_host
        self.tables = CapturedTables()
        self._looked_up: dict[tuple[Any, ...], tuple[Tensor, list[Interval], Interval]] = {}
        self._wants_values = False
        self._outside: Tensor | None = None
        self._outside_tables: set[str] = set()

    def interval_ends(self, b: Interval, h: Interval, q_idx: Interval, kv_idx: Interval) -> Ends:
        """Bound the mask in each cell.

        Args:
            b: Of as many dimensions as there are in the cells, as all arguments.
            h: Head.
            q_idx: Queries of each cell.
            kv_idx: Keys of each cell.

        Returns:
            Where the mask is surely true and where it may be true, ``(2, ...)``, broadcastable to
            the cells. Cells in which a captured tensor may be indexed out of range count as
            unknown.

        Raises:
            NoIntervalRule: If intervals cannot follow the mask_mod at all.
            MaskError: If the mask_mod breaks a rule of FlexAttention.
        """
        self._wants_values = False
        mask = self._run(b, h, q_idx, kv_idx)
        ends = mask.ends
        if mask.is_exact:
            ends = ends.expand(2, *(ends.shape or (1,) * b.lo.dim()))
        if self._outside is not None:
            return torch.stack((ends[0] & ~self._outside, ends[1] | self._outside))
        return ends

    def pairs(self, b: Interval, h: Interval, q_idx: Interval, kv_idx: Interval) -> Tensor:
        """Evaluate the mask where all indices are exact.

        Args:
            b: ``(N, 1, 1)``.
            h: ``(N, 1, 1)``.
            q_idx: ``(N, Q, 1)``.
            kv_idx: ``(N or 1, 1, K)``.

        Returns:
            The mask, ``(N, Q, K)``.

        Raises:
            MaskError: As `interval_ends`, and where a captured tensor is indexed out of range.
        """
        shape = (len(b.ends), q_idx.ends.shape[1], kv_idx.ends.shape[2])
        if not self.needs_vmap:
            self._wants_values = True
            try:
                mask = self._run(b, h, q_idx, kv_idx).ends
            except NoIntervalRule:
                self.needs_vmap = True
        if self.needs_vmap:
            indices = (b.lo[:, 0, 0], h.lo[:, 0, 0], q_idx.lo[..., 0], kv_idx.lo[:, 0])
            mask, self._outside = pairs_by_vmap(self._mask_mod, *indices)
        self._refuse_outside()
        return mask.expand(shape)

    def refuse_host_read(self, what: str) -> NoReturn:
        """Raise the error for a mask_mod that asks for a value."""
        raise host_read_error(self._mask_mod, what)

    def read_bounds(self, ends: Ends) -> Bounds:
        """Return Python numbers around all cells."""
        if self._reads_host:
            smallest, largest = torch.stack(torch.aminmax(ends)).tolist()
            return smallest, largest
        limits = torch.iinfo(ends.dtype) if ends.dtype in INTEGERS else torch.finfo(ends.dtype)
        return cast(Bounds, (limits.min, limits.max))

    def _run(self, b: Interval, h: Interval, q_idx: Interval, kv_idx: Interval) -> Interval:
        self._outside = None
        indices = cast("tuple[Tensor, Tensor, Tensor, Tensor]", (b, h, q_idx, kv_idx))
        try:
            with torch.no_grad(), self:
                result = self._mask_mod(*indices)
        except TypeError as error:
            # Functions that accept tensors only, or a true error: exact evaluation will tell.
            check_signature(self._mask_mod)
            raise NoIntervalRule(str(error)) from error
        finally:
            # Its intervals refer to the evaluator: tensors would stay until garbage is collected.
            self._looked_up.clear()
        check_result(self._mask_mod, result)
        if isinstance(result, Interval):
            return result
        return Interval(result.to(self._device), self, is_exact=True)

    # What torch calls in place of its functions while the mask_mod runs.

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Apply a torch function; those without an interval argument run as they are."""
        kwargs = kwargs or {}
        if _has_interval((*args, *kwargs.values())):
            return self.apply(func, args, kwargs)
        check_pointwise(self._mask_mod, func, args, kwargs)
        return func(*args, **kwargs)

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply a torch function or Python operator of which some argument is an interval."""
        with torch._C.DisableTorchFunction():
            if func is Tensor.__getitem__:
                return self.select(args[0], args[1])
            if func in EXTREMA and len(args) == 2 and isinstance(args[1], (Interval, Tensor)):
                func = EXTREMA[func]
            if func is Tensor.where:
                func, args = torch.where, (args[1], args[0], *args[2:])
            rule = RULES.get(func)
            if rule is not None:
                return self._apply_rule(rule, (func, args, kwargs))
            if func in CASTS:
                return self._cast(args[0], CASTS[func])
            if func in (Tensor.to, Tensor.type, Tensor.type_as):
                return self._convert(args[0], args[1:], kwargs)
            if func in FACTORIES:
                return self._filled((func, args, kwargs))
            check_pointwise(self._mask_mod, func, args, kwargs)
            return self._unknown((func, args, kwargs))

    def _apply_rule(self, rule: Rule, call: Call) -> Interval:
        func, args, kwargs = call
        if rule.promotes:
            args = self._promoted(args)
        operands = [self._operand(x) for x in args]
        named = {n: x if isinstance(x, str) else self._operand(x) for n, x in kwargs.items()}
        is_exact = all(x.is_exact for x in (*operands, *named.values()) if isinstance(x, Interval))
        if is_exact:
            values = {name: _value(x) for name, x in kwargs.items()}
            ends: Ends | None = func(*map(_value, args), **values)
        else:
            ends = rule.ends(*operands, **named) if rule.keywords >= kwargs.keys() else None
        if ends is None:
            return self._unknown((func, args, kwargs))
        if ends.dtype in INTEGERS and rule.bounds is not None:
            bounds = _result_bounds(rule, operands, named, is_exact)
            if bounds is not None and fits(bounds, ends.dtype):
                span = None if is_exact else rule.shifted_span(operands)
                return Interval(ends, self, is_exact=is_exact, bounds=bounds, span=span)
            if not is_exact:
                return self._unknown((func, args, kwargs))
        if ends.dtype.is_floating_point and not is_exact:
            ends = finite_ends(ends)
        return Interval(ends, self, is_exact=is_exact)

    def _promoted(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Promote with a captured 0-d tensor as vmap does; broadcasting would not."""
        if len(args) != 2 or not any(isinstance(x, Tensor) for x in args):
            return args
        dtype = torch.promote_types(args[0].dtype, args[1].dtype)
        return tuple(x if x.dtype == dtype else self._cast_to(x, dtype) for x in args)

    def _cast_to(self, x: Interval | Tensor, dtype: torch.dtype) -> Interval | Tensor:
        return x.to(dtype) if isinstance(x, Tensor) else self._cast(x, dtype)

    def _operand(self, x: Any) -> Any:
        """Make an interval of a constant."""
        if x is None or isinstance(x, Interval):
            return x
        if isinstance(x, (bool, int, float)):
            number = cast(Tensor, x)
            return Interval(number, self, is_exact=True, bounds=cast(Bounds, (x, x)))
        if isinstance(x, Tensor):
            if x.dim() > 0:
                raise NoIntervalRule("a captured tensor that is not indexed")
            self._check_device(x)
            return Interval(x, self, is_exact=True)
        if isinstance(x, numbers.Real):
            return self._operand(int(x) if isinstance(x, numbers.Integral) else float(x))
        raise NoIntervalRule(f"an operand of type {type(x).__name__}")

    def _cast(self, value: Interval, dtype: torch.dtype) -> Interval:
        if value.dtype == dtype:
            return value
        if value.is_exact:
            return Interval(value.ends.to(dtype), self, is_exact=True)
        ends = cast_ends(value, dtype)
        if ends is None:
            return self._unknown((Tensor.to, (value, dtype), {}))
        keeps_bounds = dtype in INTEGERS and value.dtype in INTEGERS
        return Interval(ends, self, bounds=value.known_bounds if keeps_bounds else None)

    def _convert(
        self, value: Interval | Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Interval | Tensor:
        """Apply Tensor.to, .type or .type_as."""
        target = value.dtype
        for x in (
            *args,
            *(kwargs[name] for name in ("dtype", "device", "other") if name in kwargs),
        ):
            if isinstance(x, torch.dtype):
                target = x
            elif isinstance(x, (Tensor, Interval)):
                target = x.dtype
            elif isinstance(x, (str, torch.device)) and torch.device(x) != value.device:
                raise NoIntervalRule("a move to another device")
        return self._cast_to(value, target)

    def _filled(self, call: Call) -> Interval:
        """Apply a function that makes a constant, such as ``b.new_ones(())``."""
        func, (like, *args), kwargs = call
        if _has_interval((*args, *kwargs.values())):
            raise NoIntervalRule(func.__name__)
        value = func(like.lo, *args, **kwargs)
        if value.shape not in ((), like.lo.shape):
            raise NoIntervalRule(f"{func.__name__} of shape {tuple(value.shape)}")
        value = value.expand(like.lo.shape)
        return Interval(value, self, is_exact=True)

    def _unknown(self, call: Call) -> Interval:
        """Return an interval that holds every value of the result's dtype."""
        func, args, kwargs = call
        name = getattr(func, "__name__", str(func))
        if "out" in kwargs or (name.endswith("_") and func not in RULES):
            raise NoIntervalRule(f"{name} in place")
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Interval)]
        if func not in RULES and func not in CASTS and func is not Tensor.to:
            if self._wants_values:
                raise NoIntervalRule(name)
            self.needs_vmap = True
        dtype = _result_dtype(call)
        shape = torch.broadcast_tensors(*(x.lo for x in given))[0].shape
        return Interval(full_ends(dtype, shape, self._device), self)

    # Captured tensors.

    def select(self, table: Tensor | Selection, index: Any) -> Interval | Selection:
        """Index a captured tensor, or what earlier indices left of it."""
        if isinstance(table, Interval):
            raise NoIntervalRule("indexing an index")
        selection = table if isinstance(table, Selection) else Selection(self, table)
        selection = selection.indexed(index)
        if any(x is None for x in selection.indices):
            return selection
        indices = [self._operand(x) for x in selection.indices]
        return self._look_up(selection.table, indices)

    def _look_up(self, table: Tensor, indices: list[Interval]) -> Interval:
        """Look up once per run what is indexed alike, as ``ids[q_idx]`` in several places."""
        key = (id(table), *(id(index.ends) for index in indices))
        if key not in self._looked_up:
            # The key's objects are kept, so that no others can get their ids.
            self._looked_up[key] = table, indices, self._extrema(table, indices)
        # Each time an interval of its own, which operators in place may change.
        return self._looked_up[key][2].copied()

    def _extrema(self, table: Tensor, indices: list[Interval]) -> Interval:
        self._check_device(table)
        indices = [self._in_range(table, dim, index) for dim, index in enumerate(indices)]
        if all(index.is_exact for index in indices):
            value = table[tuple(index.ends for index in indices)]
            return Interval(value, self, is_exact=True)
        return Interval.of_triple(self.tables.extrema(table, indices), self)

    def _in_range(self, table: Tensor, dim: int, index: Interval) -> Interval:
        """Clamp an index to its dimension, and note the cells where it may lie outside."""
        if isinstance(index.ends, Tensor) and index.dtype not in INDEX_DTYPES:
            raise NoIntervalRule(f"an index of dtype {index.dtype}")
        if not self._reads_host:
            return index
        length = table.shape[dim]
        smallest, largest = index.bounds
        if -length <= smallest and largest < length:
            return index
        if index.span is not None or not isinstance(index.ends, Tensor):
            raise MaskError(
                f"{mask_name(self._mask_mod)} indexes {self._named(table)} with {smallest} to "
                f"{largest} in dimension {dim}; make it as long as the mask, or clamp the index"
            )
        outside = (index.lo < -length) | (index.hi >= length)
        self.may_leave_tables = True
        self._outside = outside if self._outside is None else self._outside | outside
        self._outside_tables.add(self._named(table))
        ends = index.ends.clamp(-length, length - 1)
        bounds = (max(smallest, -length), min(largest, length - 1))
        return Interval(ends, self, is_exact=index.is_exact, bounds=bounds)

    def _refuse_outside(self) -> None:
        if self._outside is not None and self._reads_host and bool(self._outside.any()):
            tables = ", ".join(sorted(self._outside_tables)) or "a captured tensor"
            raise MaskError(
                f"{mask_name(self._mask_mod)} indexes {tables} out of range; clamp the index, as "
                "torch.where evaluates both of its branches"
            )

    def _check_device(self, captured: Tensor) -> None:
        is_number_on_cpu = captured.dim() == 0 and captured.device.type == "cpu"
        if captured.device != self._device and not is_number_on_cpu:
            raise MaskError(
                f"{mask_name(self._mask_mod)} captures {self._named(captured)} on "
                f"{captured.device}, but the mask is built on {self._device}; move one of them"
            )

    def _named(self, captured: Tensor) -> str:
        name = captured_name(self._mask_mod, captured)
        return f"{name} of shape {tuple(captured.shape)}"


def _has_interval(values: Iterable[Any]) -> bool:
    return any(
        isinstance(x, (Interval, Selection)) or (isinstance(x, (tuple, list)) and _has_interval(x))
        for x in values
    )


def _value(x: Any) -> Any:
    return x.ends if isinstance(x, Interval) else x


def _result_bounds(
    rule: Rule, operands: list[Any], named: dict[str, Any], is_exact: bool
) -> Bounds | None:
    """Bounds of a result; of an exact one, only if no value must be read for them."""

    def bounds(x: Interval | None) -> Bounds | None:
        return None if x is None else x.known_bounds if is_exact else x.bounds

    limits = {name: x for name, x in named.items() if x is None or isinstance(x, Interval)}
    if is_exact and any(
        x is not None and x.known_bounds is None for x in (*operands, *limits.values())
    ):
        return None
    assert rule.bounds is not None
    return rule.bounds(*map(bounds, operands), **{n: bounds(x) for n, x in limits.items()})


def _result_dtype(call: Call) -> torch.dtype:
    """Find the dtype of a function's result, without running it on data.

    A 0-d tensor among the arguments may count for promotion or not, depending on how torch.vmap
    treats the function: see `Rule.promotes`.

    Raises:
        NoIntervalRule: If the result is not one number, or promotion is in doubt.
    """
    dtypes = {_probed_dtype(call, shape) for shape in ([(1,)] if call[0] in RULES else [(1,), ()])}
    if len(dtypes) > 1:
        raise NoIntervalRule("a function that may promote a 0-d tensor")
    return dtypes.pop()


def _probed_dtype(call: Call, shape: tuple[int, ...]) -> torch.dtype:
    func, args, kwargs = call

    def described(x: Any) -> Any:
        if isinstance(x, Interval):
            return torch.ones(shape, dtype=x.dtype, device="meta")
        if isinstance(x, Selection):
            raise NoIntervalRule("a captured tensor that is indexed in part")
        if isinstance(x, list | tuple):
            return type(x)(map(described, x))
        return x.to("meta") if isinstance(x, Tensor) else x

    try:
        result = func(*map(described, args), **{k: described(v) for k, v in kwargs.items()})
    except RuntimeError as error:
        raise NoIntervalRule(str(error)) from error
    if not isinstance(result, Tensor) or result.shape != shape:
        raise NoIntervalRule(getattr(func, "__name__", str(func)))
    return result.dtype
