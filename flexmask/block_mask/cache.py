"""A bounded cache of the index tensors of BlockMasks, keyed by everything that they depend on.

Two layouts of the same shape have different masks, so a key contains the content of the layouts.
The cache holds only the four index tensors: a mask_mod captures buffers whose content changes from
batch to batch, so each BlockMask is made from the cached tensors and the current mask_mod.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

if TYPE_CHECKING:
    from flexmask.mod_types import MaskMod


Indices = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Counts and indices of partial tiles, and of full ones."""


@dataclass(frozen=True)
class BlockMaskKey:
    """Everything that a BlockMask depends on.

    Attributes:
        strategy: The strategy with its parameters, equal to another if both give equal masks.
        layouts: `Layout.digest` of each row.
        window: Sliding window of the model's layer, in positions; None for full attention.
        q_length: Number of queries.
        kv_length: Number of keys.
        reused: The slots that have no query, because their keys and values are copied.
        block_size: Queries and keys per tile.
        device: Device of the index tensors.
    """

    strategy: Hashable
    layouts: tuple[bytes, ...]
    window: int | None
    q_length: int
    kv_length: int
    reused: Hashable
    block_size: tuple[int, int]
    device: str


@dataclass(frozen=True)
class CacheStats:
    """Hits, misses and evictions of a cache so far, and its present entries and bytes."""

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int


def plain_indices(mask: BlockMask) -> Indices:
    """Copy the index tensors, so that they are not views of a larger tensor.

    Dynamo guards on the sizes of a view's base, so views of one joint tensor would compile again
    for another length.
    """
    full_num, full = mask.full_kv_num_blocks, mask.full_kv_indices
    return (
        mask.kv_num_blocks.clone(),
        mask.kv_indices.clone(),
        None if full_num is None else full_num.clone(),
        None if full is None else full.clone(),
    )


@dataclass(frozen=True)
class _Entry:
    indices: Indices
    seq_lengths: tuple[int, int]
    block_size: tuple[int, int]

    @classmethod
    def of(cls, mask: BlockMask) -> _Entry:
        return cls(plain_indices(mask), mask.seq_lengths, mask.BLOCK_SIZE)

    def joined(self, mask_mod: MaskMod) -> BlockMask:
        return BlockMask.from_kv_blocks(
            *self.indices,
            BLOCK_SIZE=self.block_size,
            mask_mod=mask_mod,
            seq_lengths=self.seq_lengths,
            compute_q_blocks=False,
        )

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.indices if t is not None)


class BlockMaskCache:
    """Keeps the most recently used masks within ``max_bytes``; threads may share it."""

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        """Create an empty cache."""
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._lock = Lock()

    @property
    def stats(self) -> CacheStats:
        """The counts so far."""
        with self._lock:
            return CacheStats(
                self._hits, self._misses, self._evictions, len(self._entries), self._bytes
            )

    def get(
        self, key: BlockMaskKey, mask_mod: MaskMod, build: Callable[[], BlockMask]
    ) -> BlockMask:
        """Return the mask of ``key`` with ``mask_mod``, and build it if it is not in the cache.

        Args:
            key: Everything that the index tensors depend on.
            mask_mod: The mask_mod over the present buffers.
            build: Builds the BlockMask.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                self._hits += 1
        if entry is None:
            entry = _Entry.of(build())
            self._keep(key, entry)
        return entry.joined(mask_mod)

    def _keep(self, key: BlockMaskKey, entry: _Entry) -> None:
        with self._lock:
            self._misses += 1
            replaced = self._entries.pop(key, None)
            self._bytes += entry.bytes - (replaced.bytes if replaced else 0)
            self._entries[key] = entry
            while self._bytes > self._max_bytes and self._entries:
                _, oldest = self._entries.popitem(last=False)
                self._bytes -= oldest.bytes
                self._evictions += 1
