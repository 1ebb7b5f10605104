"""Counters of the store, per tier."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class TierCounters:
    """Counts of a tier of memory.

    Attributes:
        hits: Requests that found their span here.
        misses: Requests that did not; they went on to the next tier.
        evictions: Spans that left to make room for others.
        too_large: Times that a span was larger than the whole tier, and not kept.
        bytes_in: Bytes of spans that came into the tier.
        bytes_out: Bytes of spans that were copied from here to another tier.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    too_large: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True)
class FolderCounters(TierCounters):
    """Counts of what this process did with the folder.

    Attributes:
        damaged: Files that were not what was written, and were removed.
        unreadable: Times that a file could not be read for another reason.
        not_written: Spans that were not written, since the disk was full or writing had failed.
    """

    damaged: int = 0
    unreadable: int = 0
    not_written: int = 0


@dataclass(frozen=True)
class StoreCounters:
    """Counts of the tiers of a store since it was made.

    A request asks the tiers in this order, and no tier after the first that has the span. A tier
    that the store does not have counts nothing.

    Attributes:
        device: Memory of the model's device.
        host: Host memory beside a GPU.
        folder: The folder.
    """

    device: TierCounters
    host: TierCounters
    folder: FolderCounters


class Counts:
    """Numbers by name that several threads add to."""

    def __init__(self) -> None:
        """Count from zero."""
        self._numbers: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, **numbers: int) -> None:
        """Add to the counts of these names."""
        with self._lock:
            self._numbers.update(numbers)

    def values(self) -> dict[str, int]:
        """Return all counts that are not zero."""
        with self._lock:
            return dict(self._numbers)
