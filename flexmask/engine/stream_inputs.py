"""The tensors of a packed prefill: one allocation and one copy to the device for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmask.attention.flex_call import TokenStream
from flexmask.block_mask.cache import TileIndices

if TYPE_CHECKING:
    from flexmask.mod_types import MaskMod

ALIGNMENT = 32
"""Numbers to whose multiples the start of each tensor is rounded, so that kernels can read 128
bytes at once."""


@dataclass(frozen=True)
class StreamInputs:
    """The inputs of a model in a packed prefill; int32 throughout.

    Attributes:
        token_ids: ``(T,)`` tokens to compute.
        position_ids: ``(T,)`` their positions.
        stream: The slots that they are written to, and the order in which they attend.
        tile_rows: ``(N,)`` batch row of each tile of queries.
        tile_slots: ``(N, Q)`` slots of its queries.
        tiles: The key tiles of each query tile, by kind of layer.
    """

    token_ids: Tensor
    position_ids: Tensor
    stream: TokenStream
    tile_rows: Tensor
    tile_slots: Tensor
    tiles: Mapping[str, TileIndices]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of all tensors. Inputs of equal sizes can run through one CUDA graph."""
        return tuple(size for tensor in self._tensors() for size in tensor.shape)

    def packed(self, slack: int) -> Tensor:
        """Copy all tensors into one, with ``slack`` numbers behind them."""
        tensors = list(self._tensors())
        starts, length = _starts(tensors)
        pinned = torch.cuda.is_available()
        packed = torch.zeros(length + slack, dtype=torch.int32, pin_memory=pinned)
        for start, tensor in zip(starts, tensors, strict=True):
            packed[start : start + tensor.numel()] = tensor.flatten()
        return packed

    def over(self, packed: Tensor) -> StreamInputs:
        """Return inputs of the same sizes that lie in ``packed``, a tensor as `packed` makes it.

        They are no views to torch.compile, which compiles again for views of another base.
        """
        tensors = list(self._tensors())
        starts, _ = _starts(tensors)
        storage = packed.untyped_storage()
        parts = (
            packed.new_empty(0).set_(storage, start, tensor.shape, tensor.stride())
            for start, tensor in zip(starts, tensors, strict=True)
        )
        return self._rebuilt(parts)

    def _tensors(self) -> Iterator[Tensor]:
        yield from (self.token_ids, self.position_ids)
        yield from self.stream
        yield from (self.tile_rows, self.tile_slots)
        for tiles in self.tiles.values():
            yield from tiles

    def _rebuilt(self, tensors: Iterator[Tensor]) -> StreamInputs:
        def take(count: int) -> list[Tensor]:
            return [next(tensors) for _ in range(count)]

        token_ids, position_ids = take(2)
        stream = TokenStream(*take(4))
        tile_rows, tile_slots = take(2)
        tiles = {kind: TileIndices(*take(4)) for kind in self.tiles}
        return StreamInputs(token_ids, position_ids, stream, tile_rows, tile_slots, tiles)


def stream_block_mask(
    tiles: TileIndices, tile: tuple[int, int], num_keys: int, mask_mod: MaskMod, *, flat: bool
) -> BlockMask:
    """Make the BlockMask of tiles of queries over an axis of ``num_keys`` keys.

    FlexAttention wants index tensors as wide as the axis has tiles, and reads only the first
    places of each row. So the rows overlap in memory: each begins ``W`` numbers after the one
    before it, and seems to go on through those that follow. With 2 rows, ``W`` = 3 and 5 tiles::

        memory   a b c d e f . .
        row 0    a b c d e
        row 1          d e f . .

    Args:
        tiles: The key tiles of each query tile, in memory that goes on for at least
            ``num_keys / tile[1]`` numbers behind them.
        tile: Queries and keys of a tile.
        num_keys: Keys of the axis.
        mask_mod: The mask of queries and keys.
        flat: True if all tiles are one batch entry, false if each is its own.
    """
    columns = num_keys // tile[1]

    def shaped(counts: Tensor) -> Tensor:
        return counts[None, None] if flat else counts[:, None, None]

    def widened(indices: Tensor) -> Tensor:
        rows, width = indices.shape
        size = (1, 1, rows, columns) if flat else (rows, 1, 1, columns)
        strides = (rows * width, rows * width, width, 1) if flat else (width, width, width, 1)
        storage = indices.untyped_storage()
        return indices.new_empty(0).set_(storage, indices.storage_offset(), size, strides)

    return BlockMask.from_kv_blocks(
        shaped(tiles.counts),
        widened(tiles.indices),
        shaped(tiles.full_counts),
        widened(tiles.full_indices),
        BLOCK_SIZE=tile,
        mask_mod=mask_mod,
        seq_lengths=(len(tiles.counts) * tile[0] if flat else tile[0], num_keys),
        compute_q_blocks=False,
    )


def _starts(tensors: list[Tensor]) -> tuple[list[int], int]:
    """Return where each tensor starts in a packed one, and where the last one ends."""
    lengths = [-(-tensor.numel() // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    *starts, end = accumulate(lengths, initial=0)
    return starts, end
