"""Lays the tokens of a prefill out as a stream, with the tiles in which they attend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexmask.attention.flex_call import TokenStream
from flexmask.block_mask import create_block_mask
from flexmask.block_mask.cache import BlockMaskCache, BlockMaskKey, TileIndices
from flexmask.engine.prefill_kernel import BLOCK_SIZE, Tile, whole_tiles
from flexmask.engine.span_sharing import PromptSpans, RowPart
from flexmask.engine.stream_inputs import StreamInputs
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import layer_masks
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexmask.mod_types import MaskMod

    Numbers = NDArray[np.int32]

CPU = torch.device("cpu")

TOKEN_MULTIPLE = 16
"""Lengths are padded to a multiple of this on a CPU, for fast matrix products."""

GPU_STEPS = 8
"""Steps per power of two to which lengths are padded on a GPU, at least `BLOCK_SIZE` wide. Few
lengths need few CUDA graphs, and padding costs 3% of a prefill on average, 12% at most."""

MIN_TILES = 2
"""A length of one would be a constant of the graph, and other lengths would compile another."""


def padded_length(length: int, *, on_gpu: bool) -> int:
    """Return the length to which tokens, writes or queries of a stream are padded."""
    step = TOKEN_MULTIPLE
    if on_gpu:
        step = max(BLOCK_SIZE, (1 << max(0, length - 1).bit_length()) // (2 * GPU_STEPS))
    return max(step, whole_tiles(length, step))


class StreamPlanner:
    """Lays streams out for one strategy and one size of batches; the model runner makes it."""

    def __init__(
        self,
        strategy: Strategy,
        batch_size: int,
        capacity: int,
        windows: Mapping[str, int | None],
        tile: Tile,
        mask_cache: BlockMaskCache,
        *,
        on_gpu: bool,
    ) -> None:
        """Store what streams depend on.

        Args:
            strategy: The mask strategy.
            batch_size: Batch rows.
            capacity: Slots per row, a multiple of `BLOCK_SIZE`.
            windows: Sliding window of each kind of layer, in tokens; None for no window.
            tile: Queries and keys of a tile.
            mask_cache: Keeps the tiles of masks.
            on_gpu: True if the model runs on a GPU.
        """
        self._strategy = strategy
        self._capacity = capacity
        self._windows = windows
        self._tile = tile
        self._mask_cache = mask_cache
        self._on_gpu = on_gpu
        self.most_tiles = self._padded_tiles(batch_size * capacity // tile[0])
        """Most tiles of queries that a stream has."""

    def inputs(self, prompts: Sequence[PromptSpans], parts: Sequence[RowPart]) -> StreamInputs:
        """Lay out the tokens to compute, of which there is at least one."""
        side = self._tile[0]
        num_tokens = sum(len(part.slots) for part in parts)
        token_ids = np.zeros(self._padded(num_tokens), np.int32)
        positions = np.zeros_like(token_ids)
        sources, slots, tile_slots, tile_tokens = [], [], [], []
        for prompt, part in zip(prompts, parts, strict=True):
            computed = part.tokens[part.slots]
            token_ids[computed] = prompt.layout.token_array[part.slots]
            positions[computed] = prompt.layout.position_array[part.slots]
            written = np.flatnonzero(part.tokens >= 0)
            sources.append(part.tokens[written])
            slots.append(written + prompt.row * self._capacity)
            # The last query fills its tile.
            filled = np.arange(whole_tiles(len(computed), side)).clip(max=len(computed) - 1)
            tile_slots.append(part.slots[filled].reshape(-1, side))
            tile_tokens.append(computed[filled].reshape(-1, side))
        row_of_tile = np.repeat([prompt.row for prompt in prompts], list(map(len, tile_slots)))
        tiles_of = self._tile_indices(prompts, tile_slots)
        by_kind = {kind: self._widened(tiles, row_of_tile) for kind, tiles in tiles_of.items()}
        work = sum(tiles.counts + tiles.full_counts for tiles in by_kind.values())
        order = np.argsort(-np.asarray(work), kind="stable")
        queries = np.concatenate(tile_tokens)[order]
        num_tiles = self._padded_tiles(len(queries))
        places = np.zeros_like(token_ids)
        places[queries.reshape(-1)[::-1]] = np.arange(queries.size)[::-1]
        num_writes = self._padded(sum(map(len, sources)))
        return StreamInputs(
            token_ids=_tensor(token_ids),
            position_ids=_tensor(positions),
            stream=TokenStream(
                # Padding writes the last key once more.
                sources=_tensor(_filled(np.concatenate(sources), num_writes)),
                slots=_tensor(_filled(np.concatenate(slots), num_writes)),
                queries=_tensor(_filled(queries, num_tiles)),
                places=_tensor(places),
            ),
            tile_rows=_tensor(_filled(row_of_tile[order], num_tiles)),
            tile_slots=_tensor(_filled(np.concatenate(tile_slots)[order], num_tiles)),
            tiles={kind: _ordered(tiles, order, num_tiles) for kind, tiles in by_kind.items()},
        )

    def _widened(
        self, of_rows: Sequence[TileIndices], row_of_tile: NDArray[np.integer]
    ) -> TileIndices:
        """Join the tiles of rows, with indices on the axis of the slots of all rows."""
        columns = self._capacity // self._tile[1]

        # In numpy, because torch would wake a thread per core for each of these small copies.
        def joined(tensors: Sequence[Tensor]) -> Tensor:
            wide = np.repeat((row_of_tile * columns).astype(np.int32)[:, None], columns, 1)
            first = 0
            for tensor in tensors:
                size, width = tensor.shape
                wide[first : first + size, :width] += tensor.numpy()
                first += size
            return torch.from_numpy(wide)

        counts, indices, full_counts, full_indices = zip(*of_rows, strict=True)
        return TileIndices(
            torch.cat(counts), joined(indices), torch.cat(full_counts), joined(full_indices)
        )

    def _tile_indices(
        self, prompts: Sequence[PromptSpans], tile_slots: Sequence[Numbers]
    ) -> dict[str, list[TileIndices]]:
        """Find the key tiles that each tile of queries sees, by kind of layer and prompt.

        Args:
            prompts: The prompts.
            tile_slots: ``(N, Q)`` slots of the queries of each prompt by tiles.
        """
        keys = {
            kind: [
                BlockMaskKey(
                    self._strategy, prompt.layout.digest, window, slots.tobytes(), self._tile
                )
                for prompt, slots in zip(prompts, tile_slots, strict=True)
            ]
            for kind, window in self._windows.items()
        }
        # Prompts with equal keys have equal tiles; the last of them stands for all.
        index_of = {
            key: index
            for of_kind in keys.values()
            for index, key in enumerate(of_kind)
            if len(tile_slots[index])
        }
        found = {key: self._mask_cache.find(key) for key in index_of}
        missing = sorted({index_of[key] for key, tiles in found.items() if tiles is None})
        if missing:
            built = self._built_tiles(
                [prompts[index] for index in missing], [tile_slots[index] for index in missing]
            )
            for kind, of_kind in built.items():
                for index, tiles in zip(missing, of_kind, strict=True):
                    found[keys[kind][index]] = tiles
                    self._mask_cache.keep(keys[kind][index], tiles)
        return {
            kind: [found.get(key) or _no_tiles() for key in of_kind]
            for kind, of_kind in keys.items()
        }

    def _built_tiles(
        self, prompts: Sequence[PromptSpans], tile_slots: Sequence[Numbers]
    ) -> dict[str, list[TileIndices]]:
        """Build the key tiles of query tiles of prompts.

        Each tile of queries is a batch row of the mask that is built, so a prompt takes as many as
        it has, and its queries need not be neighbours.
        """
        side, width = self._tile
        size = len(prompts)
        counts = [prompt.count for prompt in prompts]
        layouts = [prompt.layout for prompt in prompts]
        capacity = whole_tiles(max(map(len, layouts)), width)
        batch = LayoutBatch(size, capacity, CPU)
        batch.load(layouts, counts, [0] * size)
        sizes = list(map(len, tile_slots))
        row_of = torch.from_numpy(np.repeat(np.arange(size), sizes))
        slot_of = torch.from_numpy(np.concatenate(tile_slots))

        def of_tiles(mask_mod: MaskMod) -> MaskMod:
            def of_tiles(t: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
                return mask_mod(row_of[t], h, slot_of[t, q_idx], kv_idx)

            return of_tiles

        built: dict[str, list[TileIndices]] = {}
        for kind, mask_mod in layer_masks(self._strategy, batch, self._windows).items():
            mask = create_block_mask(
                of_tiles(mask_mod),
                len(row_of),
                None,
                side,
                whole_tiles(max(counts), width),
                CPU,
                self._tile,
                pointwise_only=True,
            )
            assert mask.full_kv_num_blocks is not None
            assert mask.full_kv_indices is not None
            whole = (
                mask.kv_num_blocks[:, 0, 0],
                mask.kv_indices[:, 0, 0],
                mask.full_kv_num_blocks[:, 0, 0],
                mask.full_kv_indices[:, 0, 0],
            )
            parts = zip(*(tensor.split(sizes) for tensor in whole), strict=True)
            built[kind] = [
                _without_columns(TileIndices(*part), -(-count // width))
                for part, count in zip(parts, counts, strict=True)
            ]
        return built

    def _padded_tiles(self, count: int) -> int:
        side = self._tile[0]
        return whole_tiles(self._padded(max(MIN_TILES, count) * side), side) // side

    def _padded(self, length: int) -> int:
        return padded_length(length, on_gpu=self._on_gpu)


def _without_columns(tiles: TileIndices, columns: int) -> TileIndices:
    """Copy tiles with the first ``columns`` places only."""
    return TileIndices(
        tiles.counts.clone(),
        tiles.indices[:, :columns].clone(),
        tiles.full_counts.clone(),
        tiles.full_indices[:, :columns].clone(),
    )


def _ordered(tiles: TileIndices, order: NDArray[np.int64], count: int) -> TileIndices:
    """Put tiles into an order, and append empty ones up to ``count``."""

    def padded(tensor: Tensor) -> Tensor:
        result = np.zeros((count, *tensor.shape[1:]), np.int32)
        result[: len(order)] = tensor.numpy()[order]
        return torch.from_numpy(result)

    return TileIndices(*map(padded, tiles))


def _no_tiles() -> TileIndices:
    """The tiles of a prompt without a token to compute."""
    none, empty = torch.zeros(0, dtype=torch.int32), torch.zeros(0, 0, dtype=torch.int32)
    return TileIndices(none, empty, none, empty)


def _filled(values: NDArray[np.integer], length: int) -> NDArray[np.integer]:
    """Repeat the last entry up to a length."""
    return np.concatenate((values, np.repeat(values[-1:], length - len(values), 0)))


def _tensor(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))
