"""Copies of spans on the device and in pinned host memory, and the order of work on streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from flexmask.kv_store.kv_format import KVFormat
from flexmask.kv_store.span_values import SpanValues

CHUNK_BYTES = 2 << 20
"""Host copies consist of chunks of this size.

torch rounds each allocation of pinned memory up to a power of two, and keeps what is freed for
allocations of the same size. Chunks of one size are rounded by nothing, and any of them serves any
span, so that pinned memory stays at what is held.
"""


@dataclass(frozen=True)
class Moment:
    """A moment in the work of a stream of a GPU: what was queued until then."""

    stream: torch.cuda.Stream
    event: torch.cuda.Event

    @classmethod
    def now(cls, device: torch.device) -> Self | None:
        """Return the moment after all that is queued on the current stream; None on a CPU."""
        if device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(device)
        return cls(stream, stream.record_event())


@dataclass(frozen=True)
class DeviceCopy:
    """Keys and values on the device.

    Attributes:
        values: The tensors.
        ready: When they are filled; None on a CPU.
    """

    values: SpanValues
    ready: Moment | None

    def usable_values(self) -> SpanValues:
        """Return the tensors for use on the current stream, on which they may not be filled yet.

        torch would give their memory to others once they are dropped, as soon as the stream that
        they were made on is done with them; so it is told of the other one.
        """
        if self.ready is not None:
            current = torch.cuda.current_stream(self.ready.stream.device)
            if current != self.ready.stream:
                current.wait_event(self.ready.event)
                for tensor in self.values.tensors():
                    tensor.record_stream(current)
        return self.values


@dataclass(frozen=True)
class HostCopy:
    """Keys and values in host memory, as the bytes of their tensors, one after the other.

    Attributes:
        chunks: ``uint8`` tensors of `CHUNK_BYTES`, which is pinned memory beside a GPU.
        num_bytes: Bytes of the tensors.
        num_tokens: Their number of tokens.
        first_position: Position that the first key is rotated for; None for unrotated keys.
        ready: When they are filled; None if they are.
    """

    chunks: tuple[Tensor, ...]
    num_bytes: int
    num_tokens: int
    first_position: int | None
    ready: Moment | None = None

    @classmethod
    def empty(
        cls, num_bytes: int, num_tokens: int, first_position: int | None, *, is_pinned: bool
    ) -> Self:
        """Allocate chunks that are not filled."""
        chunks = tuple(
            torch.empty(CHUNK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=is_pinned)
            for _ in range(held_bytes(num_bytes) // CHUNK_BYTES)
        )
        return cls(chunks, num_bytes, num_tokens, first_position)

    @classmethod
    def of(cls, copy: DeviceCopy) -> Self:
        """Start to copy tensors from the device, on the current stream."""
        values = copy.usable_values()
        device = values.groups[0].keys.device
        is_pinned = device.type == "cuda"
        empty = cls.empty(
            values.num_bytes, values.num_tokens, values.first_position, is_pinned=is_pinned
        )
        for flat, chunk in _pieces(values.flat_bytes(), empty.chunks):
            chunk.copy_(flat, non_blocking=True)
        return replace(empty, ready=Moment.now(device))

    @property
    def held_bytes(self) -> int:
        """Bytes of the chunks."""
        return len(self.chunks) * CHUNK_BYTES

    def to_device(self, kv_format: KVFormat, device: torch.device) -> DeviceCopy:
        """Start to copy to the device, on the current stream."""
        values = SpanValues.empty(kv_format, self.num_tokens, self.first_position, device)
        if self.ready is not None:
            torch.cuda.current_stream(device).wait_event(self.ready.event)
        for flat, chunk in _pieces(values.flat_bytes(), self.chunks):
            flat.copy_(chunk, non_blocking=True)
        return DeviceCopy(values, Moment.now(device))

    def buffers(self) -> list[memoryview]:
        """Return the memory of the tensors' bytes; waits until it is filled."""
        if self.ready is not None:
            self.ready.event.synchronize()
        sizes = (CHUNK_BYTES,) * (len(self.chunks) - 1)
        last = self.num_bytes - sum(sizes)
        return [
            chunk.numpy().data[:size]
            for chunk, size in zip(self.chunks, (*sizes, last), strict=True)
        ]


def held_bytes(num_bytes: int) -> int:
    """Return the bytes of the chunks that hold so many bytes."""
    return -(-num_bytes // CHUNK_BYTES) * CHUNK_BYTES


def _pieces(flat: Sequence[Tensor], chunks: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the parts of tensors and of chunks that have the same bytes."""
    at = 0
    for tensor in flat:
        start = 0
        while start < len(tensor):
            number, offset = divmod(at, CHUNK_BYTES)
            size = min(len(tensor) - start, CHUNK_BYTES - offset)
            yield tensor[start : start + size], chunks[number][offset : offset + size]
            start += size
            at += size
