"""A tier of memory: entries bounded in bytes; those that were not used for longest leave first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from flexmask.kv_store.counters import Counts

Entry = TypeVar("Entry")


class MemoryTier(Generic[Entry]):
    """Entries by identity, whose bytes never exceed a bound. The store's lock guards it.

    A tier with a bound of 0 holds and counts nothing.

    Attributes:
        max_bytes: The bound.
        num_bytes: Bytes of all entries.
        counts: Counts by the names of `TierCounters`.
    """

    def __init__(self, max_bytes: int) -> None:
        """Hold nothing."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.counts = Counts()
        self._entries: OrderedDict[bytes, tuple[Entry, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._entries

    def look_up(self, identity: bytes) -> Entry | None:
        """Return an entry, if it is here, and count a hit or a miss."""
        found = self.use(identity)
        if self.max_bytes:
            self.counts.add(**{"misses" if found is None else "hits": 1})
        return found

    def use(self, identity: bytes) -> Entry | None:
        """Return an entry, if it is here, as the one used last; counts nothing."""
        if identity not in self._entries:
            return None
        self._entries.move_to_end(identity)
        return self._entries[identity][0]

    def takes(self, num_bytes: int) -> bool:
        """Return True if an entry of so many bytes fits into the tier; else count it."""
        if self.max_bytes and num_bytes > self.max_bytes:
            self.counts.add(too_large=1)
        return num_bytes <= self.max_bytes

    def make_room(self, num_bytes: int) -> list[tuple[bytes, Entry]]:
        """Remove entries until another one of so many bytes fits.

        Returns:
            Identities and entries that have left, the one used longest ago first.
        """
        evicted = []
        while self.num_bytes + num_bytes > self.max_bytes:
            other, (left, size) = self._entries.popitem(last=False)
            self.num_bytes -= size
            evicted.append((other, left))
        self.counts.add(evictions=len(evicted))
        return evicted

    def add(self, identity: bytes, entry: Entry, num_bytes: int) -> None:
        """Add an entry that is not here, and for which there is room, as the one used last."""
        self._entries[identity] = entry, num_bytes
        self.num_bytes += num_bytes
