"""A bounded cache of the tiles of masks, by prompt, keyed by everything that they depend on.

Two layouts of the same length have different masks, so a key contains the content of the layout.
The cache holds only index tensors, on the host: a mask_mod captures buffers whose content changes
from prompt to prompt, so each BlockMask is made of cached tensors and the current mask_mod.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class BlockMaskKey:
    """Everything that the tiles of a prompt depend on.

    Attributes:
        strategy: The strategy with its parameters, equal to another if both give equal masks.
        layout: `Layout.digest` of the prompt.
        window: Sliding window of the model's layer, in positions; None for full attention.
        queries: The slots of the queries, as bytes.
        tile: Queries and keys per tile.
    """

    strategy: Hashable
    layout: bytes
    window: int | None
    queries: bytes
    tile: tuple[int, int]


class TileIndices(NamedTuple):
    """The key tiles of each query tile, as in a BlockMask of one row and one head.

    Attributes:
        counts: ``(N,)`` partial tiles of each query tile.
        indices: ``(N, W)`` their indices, in the first places.
        full_counts: ``(N,)`` full tiles of each query tile.
        full_indices: ``(N, W)`` their indices.
    """

    counts: Tensor
    indices: Tensor
    full_counts: Tensor
    full_indices: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self)


@dataclass(frozen=True)
class CacheStats:
    """Hits, misses and evictions of a cache so far, and its present entries and bytes."""

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int


class BlockMaskCache:
    """Keeps the most recently used tiles within ``max_bytes``; threads may share it."""

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        """Create an empty cache."""
        self._max_bytes = max_bytes
        self._entries: OrderedDict[BlockMaskKey, TileIndices] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._lock = Lock()

    @property
    def stats(self) -> CacheStats:
        """The counts so far."""
        with self._lock:
            return CacheStats(
                self._hits, self._misses, self._evictions, len(self._entries), self._bytes
            )

    def find(self, key: BlockMaskKey) -> TileIndices | None:
        """Return the tiles of a prompt; None, and a miss is counted, if they are not kept."""
        with self._lock:
            tiles = self._entries.get(key)
            if tiles is None:
                self._misses += 1
            else:
                self._entries.move_to_end(key)
                self._hits += 1
            return tiles

    def keep(self, key: BlockMaskKey, tiles: TileIndices) -> None:
        """Keep the tiles of a prompt, and drop those used longest ago if bytes run out."""
        with self._lock:
            replaced = self._entries.pop(key, None)
            self._bytes += tiles.nbytes - (replaced.nbytes if replaced else 0)
            self._entries[key] = tiles
            while self._bytes > self._max_bytes and self._entries:
                _, oldest = self._entries.popitem(last=False)
                self._bytes -= oldest.nbytes
                self._evictions += 1
