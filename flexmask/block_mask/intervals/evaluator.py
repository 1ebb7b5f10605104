"""Evaluates a mask_mod: on intervals, and exactly on single (query, key) pairs."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flexmask.block_mask.intervals.captured_tables import CapturedTables, Selection, ordered
from flexmask.block_mask.intervals.interval import Bounds, Ends, Interval
from flexmask.block_mask.intervals.interval_rule import (
    COMMON,
    INTEGERS,
    Rule,
    finite_ends,
    fits,
    full_ends,
)
from flexmask.block_mask.intervals.legality import (
    EXTREMA,
    INDEX_DTYPES,
    captured_name,
    check_call,
    check_result,
    check_signature,
    functions_named,
    host_read_error,
    mask_name,
)
from flexmask.block_mask.intervals.pairs_by_vmap import PairsByVmap
from flexmask.block_mask.intervals.rule_table import RULES, cast_ends
from flexmask.block_mask.intervals.stand_in import (
    NoIntervalRule,
    StandIn,
    UnknownTensor,
)
from flexmask.errors import MaskError
from flexmask.mod_types import MaskMod
from flexmask.torch_internals import DisableTorchFunction, index_by_tensors, tree_leaves, tree_map

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
SHAPE_QUERIES = functions_named(
    "dim ndimension numel nelement size is_floating_point is_complex is_signed element_size"
)


class MaskEvaluator(TorchFunctionMode):
    """Runs one mask_mod for one build, and intercepts every torch operation in it.

    Args:
        mask_mod: The mask_mod.
        device: Device of the mask and of captured tensors.
        reads_host: Whether values may be read from the device where intervals decide nothing.
        pointwise_only: Whether to refuse operations that only FlexAttention's kernel cannot
            compute.

    Attributes:
        device: Device of the mask and of captured tensors.
        needs_vmap: Whether the mask_mod uses an operation without a rule, so that pairs must be
            evaluated through torch.vmap.
        tables: The extrema of captured tensors.
        may_leave_tables: Whether, judging by intervals, some index may be out of range.
    """

    def __init__(
        self,
        mask_mod: MaskMod,
        device: torch.device,
        reads_host: bool = True,
        *,
        pointwise_only: bool = False,
    ) -> None:
        """Create an evaluator without tables."""
        super().__init__()
        self.device = device
        self.needs_vmap = False
        self.may_leave_tables = False
        self._mask_mod = mask_mod
        self._reads_host = reads_host
        self._pointwise_only = pointwise_only
        self._by_vmap = PairsByVmap(mask_mod, pointwise_only=pointwise_only)
        self.tables = CapturedTables()
        self._looked_up: dict[tuple[Any, ...], tuple[Tensor, list[Interval], Interval]] = {}
        self._wants_values = False
        self._outside: Tensor | None = None
        self._outside_tables: set[str] = set()
        self._related: tuple[Interval, Interval, Interval] | None = None

    def interval_ends(
        self,
        b: Interval,
        h: Interval,
        q_idx: Interval,
        kv_idx: Interval,
        difference: Interval | None = None,
    ) -> Ends:
        """Bound the mask in each cell.

        Args:
            b: Batch row; all arguments have as many dimensions as the cells.
            h: Head.
            q_idx: Queries of each cell.
            kv_idx: Keys of each cell.
            difference: ``q_idx - kv_idx`` in the pairs of each cell that count, such as 0 and more
                for those on and below a diagonal; None for all pairs.

        Returns:
            Whether the mask is certainly true and whether it may be true, ``(2, ...)``,
            broadcastable to the cells. A cell in which a captured tensor may be indexed out of
            range counts as undecided.

        Raises:
            NoIntervalRule: If intervals cannot follow the mask_mod at all.
            MaskError: If the mask_mod breaks a rule of FlexAttention.
        """
        self._wants_values = False
        self._related = None if difference is None else (q_idx, kv_idx, difference)
        try:
            mask = self._run(b, h, q_idx, kv_idx)
        finally:
            self._related = None
        ends = mask.ends
        if mask.is_exact:
            ends = ends.expand(2, *(ends.shape or (1,) * b.lo.dim()))
        if self._outside is not None:
            return torch.stack((ends[0] & ~self._outside, ends[1] | self._outside))
        return ends

    def pairs(self, b: Interval, h: Interval, q_idx: Interval, kv_idx: Interval) -> Tensor:
        """Evaluate the mask for exact indices.

        Args:
            b: ``(N, 1, 1)``.
            h: ``(N, 1, 1)``.
            q_idx: ``(N, Q, 1)``.
            kv_idx: ``(N or 1, 1, K)``.

        Returns:
            The mask, ``(N, Q, K)``.

        Raises:
            MaskError: As `interval_ends`, or if a captured tensor is indexed out of range.
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
            mask, self._outside = self._by_vmap(*indices)
        self._refuse_outside()
        return mask.expand(shape)

    def refuse_host_read(self, what: str) -> NoReturn:
        """Raise the error for a mask_mod that asks for a value."""
        raise host_read_error(self._mask_mod, what)

    def read_bounds(self, ends: Ends) -> Bounds:
        """Return Python numbers around all cells."""
        if self._reads_host:
            smallest, largest = torch.stack(torch.aminmax(ordered(ends))).tolist()
            return smallest, largest
        is_float = ends.dtype.is_floating_point
        limits = torch.finfo(ends.dtype) if is_float else torch.iinfo(ends.dtype)
        return cast(Bounds, (limits.min, limits.max))

    def _run(self, b: Interval, h: Interval, q_idx: Interval, kv_idx: Interval) -> Interval:
        self._outside = None
        indices = cast("tuple[Tensor, Tensor, Tensor, Tensor]", (b, h, q_idx, kv_idx))
        try:
            with torch.no_grad(), self:
                result = self._mask_mod(*indices)
        except (MaskError, NoIntervalRule, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # Either something that only tensors can do, or an error of the mask_mod, which exact
            # evaluation raises again.
            check_signature(self._mask_mod)
            raise NoIntervalRule(str(error)) from error
        finally:
            # Intervals refer to the evaluator: tensors would stay until garbage collection.
            self._looked_up.clear()
        check_result(self._mask_mod, result)
        if isinstance(result, Interval):
            return result
        return Interval(result.to(self.device), self, is_exact=True)

    # Called by torch in place of its functions while the mask_mod runs.

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Apply a torch function; without an interval among its arguments, unchanged."""
        kwargs = kwargs or {}
        if _stand_ins((*args, *kwargs.values())):
            return self.apply(func, args, kwargs)
        self._check_call((func, args, kwargs))
        if func is Tensor.__getitem__ and any(type(x) in (bool, list) for x in _items(args[1])):
            return index_by_tensors(*args)
        return func(*args, **kwargs)

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply a torch function or Python operator of which some argument is a stand-in."""
        with DisableTorchFunction():
            if func is Tensor.__getitem__:
                return self.select(args[0], args[1])
            if func in SHAPE_QUERIES:
                return func(*map(_described, args), **kwargs)
            if func in EXTREMA and len(args) == 2 and isinstance(args[1], Tensor | StandIn):
                func = EXTREMA[func]
            if func is Tensor.where:
                func, args = torch.where, (args[1], args[0], *args[2:])
            if func in CASTS:
                return self._cast(args[0], CASTS[func])
            if func in (Tensor.to, Tensor.type, Tensor.type_as):
                return self._convert(args[0], args[1:], kwargs)
            if func in (Tensor.unbind, torch.unbind) and len(args) == 1 and not kwargs:
                return tuple(args[0])
            if not _has_dimensions((*args, *kwargs.values())):
                rule = RULES.get(func)
                if rule is not None:
                    return self._apply_rule(rule, (func, args, kwargs))
                if func in FACTORIES:
                    return self._filled((func, args, kwargs))
            self._check_call((func, args, kwargs))
            return self._unknown((func, args, kwargs))

    def _check_call(self, call: Call) -> None:
        check_call(self._mask_mod, *call, pointwise_only=self._pointwise_only)

    def _apply_rule(self, rule: Rule, call: Call) -> Any:
        func, args, kwargs = call
        if rule.promotes:
            args = self._promoted(args)
        operands = [self._operand(x) for x in args]
        if rule.by_difference and self._related is not None:
            operands = self._by_difference(operands)
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
        if ends.dtype not in COMMON and not is_exact:
            raise NoIntervalRule(f"arithmetic in {ends.dtype}")
        if ends.dtype.is_floating_point and not is_exact:
            ends = finite_ends(ends)
        return Interval(ends, self, is_exact=is_exact)

    def _by_difference(self, operands: list[Any]) -> list[Any]:
        """Return operands of the same difference, where that of queries and keys is known."""
        assert self._related is not None
        q_idx, kv_idx, difference = self._related
        zero = self._operand(0)
        if operands[0] is q_idx and operands[1] is kv_idx:
            return [difference, zero]
        if operands[0] is kv_idx and operands[1] is q_idx:
            return [zero, difference]
        return operands

    def _promoted(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Promote with a captured 0-d tensor as vmap does, and not as broadcasting does."""
        if len(args) != 2 or not any(isinstance(x, Tensor) for x in args):
            return args
        dtype = torch.promote_types(args[0].dtype, args[1].dtype)
        return tuple(x if x.dtype == dtype else self._cast_to(x, dtype) for x in args)

    def _cast_to(self, x: StandIn | Tensor, dtype: torch.dtype) -> StandIn | Tensor:
        return self._cast(x, dtype) if isinstance(x, StandIn) else x.to(dtype)

    def _operand(self, x: Any) -> Any:
        """Return a constant operand as an interval."""
        if x is None or isinstance(x, Interval):
            return x
        if isinstance(x, StandIn):
            raise NoIntervalRule("a tensor of several numbers as index")
        if isinstance(x, (bool, int, float)):
            number = cast(Tensor, x)
            return Interval(number, self, is_exact=True, bounds=cast(Bounds, (x, x)))
        if isinstance(x, Tensor):
            if x.dim() > 0:
                raise NoIntervalRule("a tensor of several numbers as index")
            self._check_device(x)
            return Interval(x, self, is_exact=True)
        if isinstance(x, numbers.Real):
            return self._operand(int(x) if isinstance(x, numbers.Integral) else float(x))
        raise NoIntervalRule(f"an operand of type {type(x).__name__}")

    def _cast(self, value: StandIn, dtype: torch.dtype) -> Any:
        if value.dtype == dtype:
            return value
        if isinstance(value, Selection):
            return value.cast_to(dtype)
        if not isinstance(value, Interval):
            return self._unknown((Tensor.to, (value, dtype), {}))
        if value.is_exact:
            return Interval(value.ends.to(dtype), self, is_exact=True)
        ends = cast_ends(value, dtype)
        if ends is None:
            return self._unknown((Tensor.to, (value, dtype), {}))
        keeps_bounds = dtype in INTEGERS and value.dtype in INTEGERS
        return Interval(ends, self, bounds=value.known_bounds if keeps_bounds else None)

    def _convert(
        self, value: StandIn | Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StandIn | Tensor:
        """Apply Tensor.to, .type or .type_as."""
        if not args and not kwargs:
            raise NoIntervalRule("the name of a type")
        target = value.dtype
        for x in (
            *args,
            *(kwargs[name] for name in ("dtype", "device", "other") if name in kwargs),
        ):
            if isinstance(x, torch.dtype):
                target = x
            elif isinstance(x, Tensor | StandIn):
                target = x.dtype
            elif isinstance(x, (str, torch.device)) and torch.device(x) != value.device:
                raise NoIntervalRule("a move to another device")
        return self._cast_to(value, target)

    def _filled(self, call: Call) -> Interval | Tensor:
        """Apply a function that creates a constant, such as ``b.new_ones(())``."""
        func, (like, *args), kwargs = call
        if _stand_ins((*args, *kwargs.values())):
            raise NoIntervalRule(func.__name__)
        number = torch.empty((), dtype=like.dtype, device=self.device)
        value: Tensor = func(number, *args, **kwargs)
        if value.dim() > 0:
            return value
        return Interval(value.expand(like.cells), self, is_exact=True)

    def _unknown(self, call: Call) -> Any:
        """Return a stand-in for a result of which only shape and dtype are known.

        Returns:
            An interval of all values of the dtype, or an `UnknownTensor` for a result with
            dimensions; lists and tuples of them if the function returns several.

        Raises:
            NoIntervalRule: If shape and dtype cannot be found, or values are needed.
        """
        func, args, kwargs = call
        name = getattr(func, "__name__", str(func))
        if self._wants_values:
            raise NoIntervalRule(name)
        if "out" in kwargs or (name.endswith("_") and func not in RULES):
            raise NoIntervalRule(f"{name} in place")
        given = (*args, *kwargs.values())
        for x in given:
            if isinstance(x, Tensor):
                self._check_device(x)
        if _has_dimensions(given) or not (func in RULES or func in CASTS or func is Tensor.to):
            self.needs_vmap = True
        return self._followed(_described_result(call), _stand_ins(given))

    def _followed(self, described: Any, given: Sequence[StandIn]) -> Any:
        """Return stand-ins for results that were described by tensors on the meta device."""
        cells = torch.broadcast_shapes(*(x.cells for x in given))

        def stand_in(x: Any) -> StandIn:
            if not isinstance(x, Tensor):
                raise NoIntervalRule(f"a result of type {type(x).__name__}")
            if x.dim() > 0:
                return UnknownTensor(self, x.shape, x.dtype, cells)
            return Interval(full_ends(x.dtype, cells, self.device), self)

        return tree_map(stand_in, described)

    # Captured tensors.

    def select(self, table: Any, index: Any) -> Any:
        """Index a tensor or a stand-in."""
        if isinstance(table, Tensor):
            self._check_device(table)
            table = Selection(self, table)
        selection = table.indexed(index) if isinstance(table, Selection) else None
        if selection is None:
            return self._selected_unknown(table, index)
        if any(x is None for x in selection.indices):
            return selection
        indices = [self._operand(x) for x in selection.indices]
        value: StandIn = self._look_up(selection.table, indices)
        for dtype in selection.casts:
            value = self._cast(value, dtype)
        return value

    def _selected_unknown(self, table: StandIn, index: Any) -> Any:
        """Return a stand-in for the result of slices and the like, or of unknown entries."""
        if self._wants_values:
            raise NoIntervalRule("an index that is no number")
        self.needs_vmap = True
        items = _items(index)
        dim, places = 0, list(items)
        for i, item in enumerate(items):
            if item is None or isinstance(item, slice):
                dim += item is not None
            elif item is Ellipsis:
                dim = table.ndim - sum(x is not None for x in items[i + 1 :])
            elif isinstance(item, bool):
                raise NoIntervalRule("an index of bools")
            else:
                if isinstance(item, Tensor | StandIn):
                    # The shape is the same for any number in range.
                    places[i] = 0
                self._in_range(table, dim, self._operand(item))
                dim += 1
        given = _stand_ins((table, *items))
        return self._followed(table.described[tuple(places)], given)

    def _look_up(self, table: Tensor, indices: list[Interval]) -> Interval:
        """Bound a selection; only once per run if it occurs repeatedly, as ``ids[q_idx]`` may."""
        key = (id(table), *(id(index.ends) for index in indices))
        if key not in self._looked_up:
            # Keeps the objects of the key alive, so that no others get their ids.
            self._looked_up[key] = table, indices, self._extrema(table, indices)
        # A new interval each time, because in-place operators may change it.
        return self._looked_up[key][2].copied()

    def _extrema(self, table: Tensor, indices: list[Interval]) -> Interval:
        indices = [self._in_range(table, dim, index) for dim, index in enumerate(indices)]
        if all(index.is_exact for index in indices):
            value = table[tuple(index.ends for index in indices)]
            return Interval(value, self, is_exact=True)
        return Interval.of_triple(self.tables.extrema(table, indices), self)

    def _in_range(self, table: Tensor | StandIn, dim: int, index: Interval) -> Interval:
        """Clamp an index to its dimension, and record the cells where it may be out of range."""
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
        if captured.device != self.device and not is_number_on_cpu:
            raise MaskError(
                f"{mask_name(self._mask_mod)} captures {self._named(captured)} on "
                f"{captured.device}, but the mask is built on {self.device}; move one of them"
            )

    def _named(self, captured: Tensor | StandIn) -> str:
        name = "a tensor"
        if isinstance(captured, Tensor):
            name = captured_name(self._mask_mod, captured)
        return f"{name} of shape {tuple(captured.shape)}"


def _stand_ins(values: Iterable[Any]) -> list[StandIn]:
    """Return the stand-ins among arguments, including those in lists and tuples."""
    found: list[StandIn] = []
    for x in values:
        if isinstance(x, StandIn):
            found.append(x)
        elif isinstance(x, (tuple, list)):
            found += _stand_ins(x)
    return found


def _items(index: Any) -> list[Any]:
    return list(index) if isinstance(index, tuple) else [index]


def _has_dimensions(values: Iterable[Any]) -> bool:
    """Return True if an argument is a tensor with dimensions, or a stand-in for one."""
    return any(isinstance(x, Tensor | StandIn) and x.dim() > 0 for x in values)


def _value(x: Any) -> Any:
    return x.ends if isinstance(x, Interval) else x


def _result_bounds(
    rule: Rule, operands: list[Any], named: dict[str, Any], is_exact: bool
) -> Bounds | None:
    """Return the bounds of a result; those of an exact one only if no value must be read."""

    def bounds(x: Interval | None) -> Bounds | None:
        return None if x is None else x.known_bounds if is_exact else x.bounds

    limits = {name: x for name, x in named.items() if x is None or isinstance(x, Interval)}
    if is_exact and any(
        x is not None and x.known_bounds is None for x in (*operands, *limits.values())
    ):
        return None
    assert rule.bounds is not None
    return rule.bounds(*map(bounds, operands), **{n: bounds(x) for n, x in limits.items()})


def _described_result(call: Call) -> Any:
    """Find shape and dtype of a function's result by running it on the meta device.

    Whether a 0-d tensor among the arguments counts for promotion depends on how torch.vmap treats
    the function: see `Rule.promotes`.

    Returns:
        Tensors on the meta device.

    Raises:
        NoIntervalRule: If promotion is uncertain, or the function does not run on such tensors.
    """
    func, args, kwargs = call
    promoted = _described_for(call, (1,))
    if func in RULES and not _has_dimensions((*args, *kwargs.values())):
        return promoted[0]
    result = _described_for(call, ())
    dtypes = [[getattr(x, "dtype", None) for x in tree_leaves(y)] for y in (promoted, result)]
    if dtypes[0] != dtypes[1]:
        raise NoIntervalRule("a function that may promote a 0-d tensor")
    return result


def _described_for(call: Call, shape: tuple[int, ...]) -> Any:
    """Run a function on the meta device, with tensors of a given shape for single numbers."""
    func, args, kwargs = call

    def described(x: Any) -> Any:
        if isinstance(x, Interval):
            return torch.ones(shape, dtype=x.dtype, device="meta")
        return _described(x)

    return func(*tree_map(described, args), **tree_map(described, kwargs))


def _described(x: Any) -> Any:
    if isinstance(x, StandIn):
        return x.described
    return x.to("meta") if isinstance(x, Tensor) else x
