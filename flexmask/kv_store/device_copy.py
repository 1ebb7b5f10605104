"""Copies of spans on the device and in host memory, and the order of work on streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from flexmask.kv_store.host_memory import HostMemory, held_bytes
from flexmask.kv_store.kv_format import KVFormat
from flexmask.kv_store.span_values import SpanValues


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


class HostCopy:
    """Keys and values in host memory, as the bytes of their tensors, one after the other.

    Its memory is used again once nobody holds the object and the device is done with it.

    Attributes:
        num_bytes: Bytes of the tensors.
        num_tokens: Their number of tokens.
        first_position: Position that the first key is rotated for; None for unrotated keys.
    """

    def __init__(
        self, memory: HostMemory, num_bytes: int, num_tokens: int, first_position: int | None
    ) -> None:
        """Take memory that is not filled, and that an earlier copy may still be read from."""
        self.num_bytes = num_bytes
        self.num_tokens = num_tokens
        self.first_position = first_position
        self._memory = memory
        self._chunks = memory.take(num_bytes)
        self._filled: Moment | None = None
        self._last_uses: dict[torch.cuda.Stream, torch.cuda.Event] = {}

    def __del__(self) -> None:
        if hasattr(self, "_last_uses"):
            self._memory.give_back(self._chunks, tuple(self._last_uses.values()))

    @classmethod
    def of(cls, copy: DeviceCopy, memory: HostMemory) -> Self:
        """Start to copy tensors from the device, on the current stream."""
        values = copy.usable_values()
        made = cls(memory, values.num_bytes, values.num_tokens, values.first_position)
        device = values.groups[0].keys.device
        for event in made._chunks.events:
            torch.cuda.current_stream(device).wait_event(event)
        for flat, run in _pieces(values.flat_bytes(), made._chunks.runs):
            run.copy_(flat, non_blocking=True)
        made._filled = made._used_until(Moment.now(device))
        return made

    @property
    def held_bytes(self) -> int:
        """Bytes of the memory that it holds."""
        return held_bytes(self.num_bytes)

    def to_device(self, kv_format: KVFormat, device: torch.device) -> DeviceCopy:
        """Start to copy to the device, on the current stream."""
        values = SpanValues.empty(kv_format, self.num_tokens, self.first_position, device)
        if self._filled is not None:
            torch.cuda.current_stream(device).wait_event(self._filled.event)
        for flat, run in _pieces(values.flat_bytes(), self._chunks.runs):
            flat.copy_(run, non_blocking=True)
        return DeviceCopy(values, self._used_until(Moment.now(device)))

    def buffers(self) -> list[memoryview]:
        """Return the memory, to be read or, if it is not filled yet, to be written.

        It waits until the device has filled it, or is done with its earlier use.
        """
        events = self._chunks.events if self._filled is None else (self._filled.event,)
        for event in events:
            event.synchronize()
        return [run.numpy().data for run in self._chunks.runs]

    def _used_until(self, moment: Moment | None) -> Moment | None:
        if moment is not None:
            self._last_uses[moment.stream] = moment.event
        return moment


def _pieces(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the parts of two rows of tensors that have the same bytes of the whole."""
    rows = [iter(ones), iter(others)]
    parts = [next(row) for row in rows]
    while True:
        size = min(map(len, parts))
        yield parts[0][:size], parts[1][:size]
        for number, row in enumerate(rows):
            parts[number] = parts[number][size:]
            if not len(parts[number]):
                if (part := next(row, None)) is None:
                    return
                parts[number] = part
