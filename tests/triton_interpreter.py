"""Triton's interpreter, which also checks that kernels stay inside the tensors they are given.

Importing this changes triton for the whole process: `interpreted_kernels.py` does it in its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET was not set when triton was imported"


@dataclass(frozen=True)
class Argument:
    """A tensor that a kernel was launched with."""

    name: str
    tensor: Tensor
    is_element: np.ndarray
    """Of each place from the tensor's first element to its last: views have gaps."""

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Argument:
        reach = (
            (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        is_element = torch.zeros(1 + sum(reach), dtype=torch.bool)
        is_element.as_strided(tensor.shape, tensor.stride()).fill_(True)
        return cls(name, tensor, is_element.numpy())

    def check(self, access: str, address: np.ndarray, mask: np.ndarray) -> None:
        """Raise IndexError if a lane that is not masked accesses anything but an element."""
        lanes = np.broadcast_to(mask, address.shape)
        offset = address[lanes].astype(np.int64) - self.tensor.data_ptr()
        place, rest = np.divmod(offset, self.tensor.element_size())
        is_inside = (rest == 0) & (place >= 0) & (place < len(self.is_element))
        is_inside[is_inside] = self.is_element[place[is_inside]]
        if not is_inside.all():
            raise IndexError(
                f"{access} {self.name}: {np.sum(~is_inside)} of {len(place)} lanes are outside of "
                f"the tensor; the first is at {place[~is_inside][0]} of shape "
                f"{tuple(self.tensor.shape)}, strides {self.tensor.stride()}"
            )


class CheckingBuilder(interpreter.InterpreterBuilder):  # type: ignore[misc]
    """What runs a kernel's operations: pointers know here which argument they are of."""

    backwards = False
    """Whether the last program of the grid runs first."""

    def set_grid_idx(self, *place: int) -> None:
        if self.backwards:
            place = tuple(n - 1 - i for n, i in zip(self.grid_dim, place, strict=True))
        super().set_grid_idx(*place)

    def create_masked_load(self, pointer: Any, mask: Any, *rest: Any) -> Any:
        pointer.dtype.argument.check("load of", pointer.data, mask.data)
        return super().create_masked_load(pointer, mask, *rest)

    def create_masked_store(self, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        pointer.dtype.argument.check("store to", pointer.data, mask.data)
        return super().create_masked_store(pointer, value, mask, *rest)

    def create_atomic_rmw(self, op: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        pointer.dtype.argument.check("atomic_rmw on", pointer.data, mask.data)
        return super().create_atomic_rmw(op, pointer, value, mask, *rest)

    def create_atomic_cas(self, pointer: Any, *rest: Any) -> Any:
        pointer.dtype.argument.check("atomic_cas on", pointer.data, np.True_)
        return super().create_atomic_cas(pointer, *rest)


last_launch: dict[str, Any] = {}
"""What the last launch of a watched kernel was given, by name."""


def watch(kernel: Any) -> None:
    """Note what ``kernel`` is launched with from now on: pointers get their names by it."""

    def note(*positional: Any, **by_name: Any) -> None:
        last_launch.clear()
        last_launch.update(dict(zip(kernel.arg_names, positional, strict=False)) | by_name)

    kernel.add_pre_run_hook(note)


def _converted(value: Any) -> Any:
    converted = _convert(value)
    if isinstance(value, Tensor):
        (name,) = [name for name, given in last_launch.items() if given is value]
        # Pointer arithmetic and broadcasting hand the type on as it is.
        converted.handle.dtype.argument = Argument.of(name, value)
    return converted


_convert, interpreter._implicit_cvt = interpreter._implicit_cvt, _converted
interpreter.interpreter_builder.__class__ = CheckingBuilder
# Overflow is computed but, without debugging, not looked at: a quarter of the time.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@triton.jit
def straying_kernel(x_ptr, ACCESS: tl.constexpr):
    """Access the first four places of ``x``, whether they are elements or not."""
    lane = tl.arange(0, 4)
    place = x_ptr + lane
    if ACCESS == "load of":
        tl.load(place)
    elif ACCESS == "store to":
        tl.store(place, lane)
    elif ACCESS == "atomic_rmw on":
        tl.atomic_add(place, lane)
    else:
        tl.atomic_cas(place, lane, lane)
