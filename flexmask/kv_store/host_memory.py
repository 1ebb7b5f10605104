"""Host memory for copies of spans, pinned beside a GPU, that never grows beyond what is held.

torch rounds each allocation of pinned memory up to a power of two, keeps what is freed for
allocations of the same size, and allocates more while freed memory is still being copied. So
memory is taken from torch in slabs and given out in chunks of one size, any of which serves any
span.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 2 << 20
"""Bytes of a chunk."""

SLAB_BYTES = 64 << 20
"""Bytes that are allocated at once: a large slab takes half the time of as many chunks."""


@dataclass(frozen=True)
class TakenChunks:
    """Chunks that were taken for a copy.

    Attributes:
        numbers: Their numbers.
        runs: Their memory, ``uint8``, in as few tensors as it has gaps.
        events: Events after which their earlier users are done with them.
    """

    numbers: tuple[int, ...]
    runs: tuple[Tensor, ...]
    events: tuple[torch.cuda.Event, ...]


class HostMemory:
    """Chunks of host memory. Any thread may use it."""

    def __init__(self, expected_bytes: int, *, is_pinned: bool) -> None:
        """Allocate nothing.

        Args:
            expected_bytes: Bytes of chunks that are used in the end; slabs of more are not
                allocated unless it turns out otherwise.
            is_pinned: True for pinned memory.
        """
        self._expected = expected_bytes // CHUNK_BYTES
        self._is_pinned = is_pinned
        self._lock = threading.Lock()
        self._slabs: list[Tensor] = []
        self._places: list[tuple[int, int]] = []  # of each chunk: its slab, and where in it
        self._free: list[int] = []
        self._events: dict[int, Sequence[torch.cuda.Event]] = {}
        self._returned: deque[tuple[TakenChunks, Sequence[torch.cuda.Event]]] = deque()

    @property
    def num_bytes(self) -> int:
        """Bytes that are allocated, whether they are taken or not."""
        return len(self._places) * CHUNK_BYTES

    def take(self, num_bytes: int) -> TakenChunks:
        """Take chunks for so many bytes, which the runs have exactly."""
        count = held_bytes(num_bytes) // CHUNK_BYTES
        with self._lock:
            self._collect()
            while len(self._free) < count:
                self._grow(count - len(self._free))
            numbers = tuple(self._free[:count])
            del self._free[:count]
            used = [event for number in numbers for event in self._events.pop(number, ())]
            return TakenChunks(numbers, self._runs(numbers, num_bytes), tuple(set(used)))

    def give_back(self, chunks: TakenChunks, events: Sequence[torch.cuda.Event]) -> None:
        """Give chunks back, to be used again after some events.

        It takes no lock, since an object may be destroyed, and call this, at any time.
        """
        self._returned.append((chunks, events))

    def _collect(self) -> None:
        if not self._returned:
            return
        while self._returned:
            chunks, events = self._returned.popleft()
            self._free += chunks.numbers
            self._events.update(dict.fromkeys(chunks.numbers, events))
        self._free.sort()  # so that neighbours are taken together

    def _grow(self, missing: int) -> None:
        """Allocate a slab, of a power of two of chunks."""
        left = self._expected - len(self._places)
        count = min(SLAB_BYTES // CHUNK_BYTES, left if left > 0 else missing)
        count = 1 << (max(1, count).bit_length() - 1)
        size = count * CHUNK_BYTES
        slab = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._is_pinned)
        self._free += range(len(self._places), len(self._places) + count)
        self._places += [(len(self._slabs), number) for number in range(count)]
        self._slabs.append(slab)

    def _runs(self, numbers: Sequence[int], num_bytes: int) -> tuple[Tensor, ...]:
        found: list[list[int]] = []  # of each run: its slab, first chunk and end
        for number in numbers:
            slab, place = self._places[number]
            if found and found[-1][0] == slab and found[-1][2] == place:
                found[-1][2] += 1
            else:
                found.append([slab, place, place + 1])
        unused = len(numbers) * CHUNK_BYTES - num_bytes
        runs = [
            self._slabs[slab][CHUNK_BYTES * start : CHUNK_BYTES * end]
            for slab, start, end in found
        ]
        runs[-1] = runs[-1][: len(runs[-1]) - unused]
        return tuple(runs)


def held_bytes(num_bytes: int) -> int:
    """Return the bytes of the chunks that hold so many bytes."""
    return -(-num_bytes // CHUNK_BYTES) * CHUNK_BYTES
