"""Stand-ins for tensors, which a mask_mod is called with in place of numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor


class NoIntervalRule(Exception):
    """An operation that intervals cannot follow, so that the mask_mod is evaluated exactly."""


class Evaluator(Protocol):
    """Applies operations to stand-ins; `evaluator.MaskEvaluator` is one.

    Attributes:
        device: Device of the mask.
    """

    device: torch.device

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply a function of torch, or a Python operator, of which an argument is a stand-in."""

    def refuse_host_read(self, what: str) -> NoReturn:
        """Raise the error for a mask_mod that asks for a value."""

    def read_bounds(self, ends: Tensor) -> tuple[int, int]:
        """Return Python numbers around the ends of all cells."""


class StandIn:
    """Has the interface of a tensor; operators, methods and functions call the evaluator.

    Attributes:
        evaluator: Applies operations to it.
    """

    __slots__ = ("evaluator",)
    __hash__ = object.__hash__
    __array_priority__ = 1000
    """As of a tensor, so that numpy's numbers let this class handle operators."""

    evaluator: Evaluator

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """As of a tensor."""
        raise NotImplementedError

    @property
    def cells(self) -> torch.Size:
        """Shape of the cells on which the value depends."""
        raise NotImplementedError

    @property
    def described(self) -> Tensor:
        """A tensor on the meta device that has its shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @property
    def device(self) -> torch.device:
        """As of a tensor."""
        return self.evaluator.device

    @property
    def ndim(self) -> int:
        """As of a tensor."""
        return len(self.shape)

    def dim(self) -> int:
        """As of a tensor."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """As of a tensor."""
        return self.shape.numel()

    def __len__(self) -> int:
        """As of a tensor."""
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the entries of the first dimension."""
        return iter([self[i] for i in range(len(self))])

    def __getattr__(self, name: str) -> Any:
        """Return the tensor method ``name``, which calls the evaluator."""
        method = getattr(Tensor, name, None)
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
        """Make torch functions accept the class; the evaluator, a mode, handles them first."""
        raise NoIntervalRule(getattr(func, "__name__", str(func)))

    def __getitem__(self, index: Any) -> Any:
        """Index through the evaluator."""
        return self.evaluator.apply(Tensor.__getitem__, (self, index), {})

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        """Refuse assignment, which only exact evaluation can follow."""
        raise NoIntervalRule("assignment to part of a tensor")

    def __contains__(self, value: Any) -> NoReturn:
        """Refuse `in`."""
        self.evaluator.refuse_host_read("`in` on a tensor")

    def __bool__(self) -> NoReturn:
        """Refuse `if` and `and`."""
        self.evaluator.refuse_host_read("`if`, `and`, `or` or `not` on a tensor")

    def __int__(self) -> NoReturn:
        """Refuse int()."""
        self.evaluator.refuse_host_read("int() of a tensor")

    def __float__(self) -> NoReturn:
        """Refuse float()."""
        self.evaluator.refuse_host_read("float() of a tensor")

    def __complex__(self) -> NoReturn:
        """Refuse complex()."""
        self.evaluator.refuse_host_read("complex() of a tensor")

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse conversion to an array of numpy."""
        self.evaluator.refuse_host_read("a tensor as numpy array")

    def __index__(self) -> NoReturn:
        """Refuse range() and the indexing of lists."""
        self.evaluator.refuse_host_read("a tensor as Python index")


class UnknownTensor(StandIn):
    """A tensor of which only shape and dtype are known, such as ``table[b] + 1``."""

    __slots__ = ("_cells", "_dtype", "_shape")

    def __init__(
        self, evaluator: Evaluator, shape: torch.Size, dtype: torch.dtype, cells: torch.Size
    ) -> None:
        """Stand for any tensor of that shape and dtype, which depends on ``cells``."""
        self.evaluator = evaluator
        self._shape = shape
        self._dtype = dtype
        self._cells = cells

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor."""
        return self._dtype

    @property
    def shape(self) -> torch.Size:
        """As of a tensor."""
        return self._shape

    @property
    def cells(self) -> torch.Size:
        """Shape of the cells on which it depends."""
        return self._cells


def _install_operators() -> None:
    binary = "add sub mul matmul truediv floordiv mod pow and_ or_ xor lshift rshift".split()

    def install(name: str, method: Callable[..., Any]) -> None:
        setattr(StandIn, f"__{name.rstrip('_')}__", method)

    def forward(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: self.evaluator.apply(op, (self, other), {})

    def reflected(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: self.evaluator.apply(op, (other, self), {})

    def in_place(op: Callable[..., Any]) -> Callable[..., Any]:
        def update(self: StandIn, other: Any) -> StandIn:
            result = self.evaluator.apply(op, (self, other), {})
            if type(result) is not type(self) or result.dtype != self.dtype:
                raise NoIntervalRule(f"in-place {op.__name__} that changes the dtype")
            for name in type(self).__slots__:
                setattr(self, name, getattr(result, name))
            return self

        return update

    for name in binary:
        op = cast(Callable[..., Any], getattr(operator, name))
        install(name, forward(op))
        install(f"r{name}", reflected(op))
        install(f"i{name}", in_place(op))
    for name in "lt le eq ne ge gt".split():
        install(name, forward(getattr(operator, name)))
    for name in "neg pos abs invert".split():
        op = getattr(operator, name)
        install(name, lambda self, op=op: self.evaluator.apply(op, (self,), {}))


_install_operators()
