"""Keys and values of a span, as a few large tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from flexmask.kv_store.kv_format import KVFormat


@dataclass(frozen=True)
class LayerGroupValues:
    """Keys and values of the layers of a `LayerGroup`.

    Attributes:
        keys: ``(L, H_kv, P, D)``.
        values: ``(L, H_kv, P, D_v)``.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class SpanValues:
    """Keys and values of a span of ``P`` tokens. Nobody changes the tensors any more.

    Attributes:
        groups: Those of each `LayerGroup` of the store's format.
        first_position: Position that the first key is rotated for; None for unrotated keys.
    """

    groups: tuple[LayerGroupValues, ...]
    first_position: int | None

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor], first_position: int | None) -> Self:
        """Make it of the tensors that `tensors` yields."""
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return cls(tuple(LayerGroupValues(*pair) for pair in pairs), first_position)

    @classmethod
    def empty(
        cls,
        kv_format: KVFormat,
        num_tokens: int,
        first_position: int | None,
        device: torch.device,
    ) -> Self:
        """Allocate tensors that are not filled."""
        dtype = getattr(torch, kv_format.dtype)
        shapes = [shape for _, shape in kv_format.shapes(num_tokens)]
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        return cls.of_tensors(tensors, first_position)

    def tensors(self) -> Iterator[Tensor]:
        """Yield keys and values of each group, in the order of `KVFormat.shapes`."""
        for group in self.groups:
            yield group.keys
            yield group.values

    @property
    def num_tokens(self) -> int:
        """The number of tokens, ``P``."""
        return self.groups[0].keys.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def compact(self) -> Self:
        """Return contiguous tensors that keep no more memory than their own.

        A tensor is copied only if it is a part of a larger one.
        """
        return self.of_tensors([_compact(it) for it in self.tensors()], self.first_position)

    def flat_bytes(self) -> list[Tensor]:
        """Return each tensor as a row of ``uint8``, without a copy; for `compact` tensors."""
        return [tensor.view(torch.uint8).view(-1) for tensor in self.tensors()]

    def buffers(self) -> list[memoryview]:
        """Return the memory of the tensors, which are on a CPU."""
        return [flat.numpy().data for flat in self.flat_bytes()]

    def check(self, kv_format: KVFormat, device: torch.device) -> None:
        """Check that the tensors are of a format and on a device.

        Raises:
            ValueError: If one is not; the message has shapes, dtypes and devices.
        """
        expected = [
            (shape, getattr(torch, kv_format.dtype), device)
            for _, shape in kv_format.shapes(self.num_tokens)
        ]
        found = [(tuple(it.shape), it.dtype, it.device) for it in self.tensors()]
        if found != expected or not self.num_tokens:
            raise ValueError(f"keys and values must be {_shown(expected)}, got {_shown(found)}")


def _compact(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        return tensor.contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _shown(tensors: Sequence[tuple[tuple[int, ...], torch.dtype, torch.device]]) -> str:
    return ", ".join(f"{shape} {dtype} on {device}" for shape, dtype, device in tensors)
