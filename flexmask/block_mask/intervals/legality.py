"""The rules that a mask_mod must follow to be compiled into an attention kernel."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmask.block_mask.intervals.captured_tables import Selection
from flexmask.block_mask.intervals.stand_in import StandIn
from flexmask.errors import MaskError
from flexmask.mod_types import MaskMod


def functions_named(names: str) -> frozenset[Any]:
    """Return the functions of torch and methods of Tensor that have one of the names."""
    found = (getattr(home, name, None) for name in names.split() for home in (torch, Tensor))
    return frozenset(function for function in found if function is not None)


REDUCTIONS = functions_named(
    "all any sum nansum mean nanmean prod amax amin aminmax argmax argmin max min median "
    "nanmedian mode std var std_mean var_mean quantile nanquantile norm dist cdist logsumexp "
    "softmax log_softmax count_nonzero nonzero argwhere unique unique_consecutive cumsum cumprod "
    "cummax cummin logcumsumexp sort msort argsort topk kthvalue bincount histc isin searchsorted "
    "bucketize dot vdot inner matmul mm mv bmm einsum tensordot trace __matmul__ __rmatmul__"
) | {operator.matmul}
HOST_READS = functions_named(
    "item tolist numpy is_nonzero equal allclose "
    "__bool__ __int__ __float__ __index__ __complex__ __contains__"
)
INDEX_DTYPES = (torch.int64, torch.int32)
RANDOM = functions_named(
    "rand randn randint randperm normal rand_like randn_like randint_like bernoulli multinomial "
    "poisson bernoulli_ normal_ uniform_ random_ exponential_ geometric_ cauchy_ log_normal_"
)
_COMBINING_MODULES = ("flexmask.mask_mods", "torch.nn.attention.flex_attention")
"""Modules whose functions combine mask_mods, such as ``and_masks``."""
EXTREMA = {
    torch.max: torch.maximum,
    torch.min: torch.minimum,
    Tensor.max: torch.maximum,
    Tensor.min: torch.minimum,
}
"""Reductions that, with a second tensor, choose the larger or smaller number of each pair."""


def host_read_error(mask_mod: MaskMod, what: str) -> MaskError:
    """Return the error for a mask_mod that reads a value."""
    return MaskError(
        f"{mask_name(mask_mod)} reads a value on the host: {what}; a mask_mod is compiled into "
        "the attention kernel, so choose with torch.where(condition, x, y) or with `&`, `|` and "
        "`~` instead"
    )


def check_call(
    mask_mod: MaskMod,
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    pointwise_only: bool,
) -> None:
    """Check a call of torch by a mask_mod.

    Args:
        mask_mod: The mask_mod.
        func: The function that it calls.
        args: The arguments.
        kwargs: The keyword arguments.
        pointwise_only: Whether reductions are refused. A BlockMask can be built from a mask_mod
            that reduces ``table[b]``, but FlexAttention cannot compile it into a kernel.

    Raises:
        MaskError: If it reads a value on the host, draws random numbers, or reduces a tensor in
            spite of ``pointwise_only``.
    """
    if func in HOST_READS:
        raise host_read_error(mask_mod, f"{func.__name__}()")
    if func in RANDOM:
        raise MaskError(
            f"{mask_name(mask_mod)} draws random numbers with {func.__name__}(); draw them "
            "beforehand, capture the tensor, and index it"
        )
    if not pointwise_only:
        return
    if func in EXTREMA and ("other" in kwargs or isinstance((*args, None)[1], Tensor | StandIn)):
        return
    if func in REDUCTIONS:
        raise MaskError(
            f"{mask_name(mask_mod)} calls {func.__name__}(), a reduction, which FlexAttention "
            "cannot compile into its kernel: a mask_mod must be pointwise; compute the reduced "
            "tensor beforehand, capture it, and index it"
        )


def check_index_dtypes(mask_mod: MaskMod, indices: Iterable[Any]) -> None:
    """Check the dtypes of a mask_mod's indices.

    Raises:
        MaskError: If an index is a byte, which torch takes as a mask, or of another integer dtype
            that torch does not accept.
    """
    for index in indices:
        if not isinstance(index, Tensor | StandIn) or index.dtype in (*INDEX_DTYPES, torch.bool):
            continue
        raise MaskError(
            f"{mask_name(mask_mod)} indexes a tensor with {index.dtype}; cast the index: "
            "`index.long()`"
        )


def check_signature(mask_mod: MaskMod) -> None:
    """Check that a mask_mod takes ``(b, h, q_idx, kv_idx)``.

    Raises:
        MaskError: If it takes other arguments.
    """
    try:
        inspect.signature(mask_mod).bind(0, 0, 0, 0)
    except TypeError as error:
        raise MaskError(
            f"{mask_name(mask_mod)} must take (b, h, q_idx, kv_idx): {error}"
        ) from error


def check_result(mask_mod: MaskMod, result: Any) -> None:
    """Check that a mask_mod returned one bool per pair.

    Raises:
        MaskError: If it returned something else.
    """
    is_tensor = isinstance(result, Tensor | StandIn)
    if is_tensor and result.dtype == torch.bool and not result.dim():
        return
    name = mask_name(mask_mod)
    if isinstance(result, bool):
        fix = "q_idx >= 0" if result else "q_idx < 0"
        raise MaskError(f"{name} returns the Python bool {result}; return a tensor: `{fix}`")
    if isinstance(result, Selection):
        raise MaskError(f"{name} returns part of a captured tensor; index all of its dimensions")
    if not is_tensor:
        raise MaskError(f"{name} returns {type(result).__name__}; it must return a bool tensor")
    if result.dtype != torch.bool:
        raise MaskError(
            f"{name} returns {result.dtype}; it must return torch.bool: compare, `x != 0`"
        )
    raise MaskError(
        f"{name} returns shape {tuple(result.shape)} for one (query, key) pair; it must return a "
        "0-d tensor, so index captured tensors in all of their dimensions"
    )


def mask_name(mask_mod: Any) -> str:
    """Return a mask_mod's name for a message: ``mask_mod 'window' (masks.py:12)``.

    For a combination by `flexmask.mask_mods` or torch it names the parts that neither of them
    defines: ``mask_mod 'near' (masks.py:12) or 'far' (masks.py:15)``.
    """
    function = _function(mask_mod)
    own = [part for part in _parts(function) if part.__module__ not in _COMBINING_MODULES]
    return f"mask_mod {' or '.join(map(_name_and_place, own or [function]))}"


def _function(mask_mod: Any) -> Any:
    """Return the function of a `functools.partial`; another mask_mod is returned unchanged."""
    while isinstance(mask_mod, functools.partial):
        mask_mod = mask_mod.func
    return mask_mod


def _parts(mask_mod: Any) -> Iterator[Any]:
    """Return the functions that a mask_mod combines; the mask_mod itself if it combines none."""
    inner: list[Any] = []
    if getattr(mask_mod, "__module__", None) in _COMBINING_MODULES:
        for cell in getattr(mask_mod, "__closure__", None) or ():
            content = cell.cell_contents
            inner += content if isinstance(content, tuple) else [content]
    parts = [_function(part) for part in inner if callable(part) and not isinstance(part, Tensor)]
    if not parts:
        yield mask_mod
    for part in parts:
        yield from _parts(part)


def _name_and_place(mask_mod: Any) -> str:
    name = getattr(mask_mod, "__qualname__", type(mask_mod).__qualname__)
    code = getattr(mask_mod, "__code__", None)
    place = f" ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else ""
    return f"'{name}'{place}"


def captured_name(mask_mod: MaskMod, tensor: Tensor) -> str:
    """Return a captured tensor's name for a message, if the mask_mod refers to it by name."""
    names = (name for name, value in captured_values(mask_mod, depth=4) if value is tensor)
    name = next(names, None)
    return "a tensor" if name is None else f"tensor '{name}'"


def captured_values(owner: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield names and values that an object captures, including those of inner functions."""
    if isinstance(owner, functools.partial):
        values = {f"argument {i}": x for i, x in enumerate((owner.func, *owner.args))}
        values |= owner.keywords
    elif inspect.isfunction(owner):
        closure = inspect.getclosurevars(owner)
        values = {**closure.globals, **closure.nonlocals}
    elif inspect.ismethod(owner):
        values = {"self": owner.__self__}
    elif isinstance(owner, list | tuple):
        values = {f"item {i}": x for i, x in enumerate(owner)}
    else:
        values = getattr(owner, "__dict__", {})
    for name, value in values.items():
        yield name, value
        if depth and not isinstance(value, Tensor | type) and not inspect.ismodule(value):
            yield from captured_values(value, depth - 1)
