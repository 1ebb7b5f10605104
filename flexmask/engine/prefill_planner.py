"""Plans prefills on the host: what to compute, what to copy, and the masks of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexmask.attention.flex_call import TokenStream
from flexmask.block_mask import create_block_mask
from flexmask.block_mask.cache import BlockMaskCache, BlockMaskKey, TileIndices
from flexmask.block_mask.equality import rows_are_causal, spans_are_causal
from flexmask.engine.prefill_kernel import BLOCK_SIZE, Tile, whole_tiles
from flexmask.engine.prefill_plan import DecodeKernel, PrefillPlan
from flexmask.engine.prefix_cache import MIN_PREFIX_TOKENS, CachedPrefix, shared_beginnings
from flexmask.engine.proof_cache import ProofCache
from flexmask.engine.stream_inputs import StreamInputs
from flexmask.errors import LayoutError
from flexmask.kernels.decode_attention import KeyTable
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch, LayoutTables, layout_tables
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


@dataclass(frozen=True)
class _Row:
    """The part of a plan for one row.

    Attributes:
        slots: Slots of the tokens to compute.
        tokens: For each slot of the prompt the token of the stream that is written to it; -1
            where the cached prefix is copied.
    """

    slots: Numbers
    tokens: Numbers


class PrefillPlanner:
    """Plans prefills for one strategy and one size of batches; the model runner makes it.

    It has a `LayoutBatch` of its own on the host, for the prompts that are planned. So masks are
    built and claims about them proved without the device, which works on other prompts meanwhile.
    """

    def __init__(
        self,
        strategy: Strategy,
        batch_size: int,
        capacity: int,
        windows: Mapping[str, int | None],
        tile: Tile,
        mask_cache: BlockMaskCache,
        *,
        changes_scores: bool,
        with_key_table: bool,
        on_gpu: bool,
    ) -> None:
        """Bind the masks of the strategy to buffers on the host.

        Args:
            strategy: The mask strategy.
            batch_size: Batch rows.
            capacity: Slots per row, a multiple of `BLOCK_SIZE`.
            windows: Sliding window of each kind of layer, in tokens; None for no window.
            tile: Queries and keys of a tile.
            mask_cache: Keeps the tiles of masks.
            changes_scores: True if the strategy changes scores; then nothing is copied, and
                decoding attends by FlexAttention.
            with_key_table: Let decoding read keys through a table.
            on_gpu: True if the model runs on a GPU.
        """
        self._strategy = strategy
        self._capacity = capacity
        self._windows = windows
        self._tile = tile
        self._mask_cache = mask_cache
        self._changes_scores = changes_scores
        self._with_key_table = with_key_table
        self._on_gpu = on_gpu
        self._batch = LayoutBatch(batch_size, capacity, CPU)
        self._masks = layer_masks(strategy, self._batch, windows)
        self._span_proofs, self._row_proofs = ProofCache(), ProofCache()

    def plan(
        self,
        prompts: Mapping[int, Layout],
        prefix: CachedPrefix | None = None,
        max_new_tokens: int | None = None,
    ) -> PrefillPlan:
        """Plan to compute all tokens of prompts but the last.

        Args:
            prompts: The layout of each prompt, by batch row.
            prefix: A prefix that is copied where prompts hold it.
            max_new_tokens: Most tokens to be decoded; None for all that fit.

        Raises:
            LayoutError: If a prompt is a single token, or leaves no room in the cache.
        """
        for layout in prompts.values():
            if len(layout) < 2:
                raise LayoutError("a prompt needs at least two tokens")
            if len(layout) >= self._capacity:
                raise LayoutError(
                    f"a prompt of {len(layout)} tokens needs a larger capacity, got "
                    f"{self._capacity}"
                )
        counts = [len(layout) - 1 for layout in prompts.values()]
        return self._plan(prompts, counts, prefix, max_new_tokens or self._capacity)

    def plan_whole(
        self, prompts: Mapping[int, Layout], prefix: CachedPrefix | None = None
    ) -> PrefillPlan:
        """Plan to compute all tokens of prompts, after which nothing is decoded.

        Args:
            prompts: The layout of each prompt, by batch row, shorter than the capacity.
            prefix: A prefix that is copied where prompts hold it.
        """
        return self._plan(prompts, [len(layout) for layout in prompts.values()], prefix, 0)

    def plan_prefix(self, layout: Layout, length: int) -> PrefillPlan | None:
        """Plan to compute the first ``length`` tokens of a prompt in row 0.

        Returns:
            None if they are not proved to see only themselves, or the strategy changes scores.
        """
        if self._changes_scores:
            return None
        self._load({0: layout}, [length])
        if not self._are_causal([(0, 0, length)], {0: layout}, length)[0]:
            return None
        return self._plan({0: layout}, [length], None, 1)

    def _load(self, prompts: Mapping[int, Layout], counts: Sequence[int]) -> LayoutTables:
        size = len(prompts)
        layouts = tuple(prompts.values())
        tables = layout_tables(layouts, counts, [0] * size, size, self._capacity)
        self._batch.load_rows(torch.tensor(list(prompts)), tables)
        return tables

    def _plan(
        self,
        prompts: Mapping[int, Layout],
        counts: Sequence[int],
        prefix: CachedPrefix | None,
        max_new_tokens: int,
    ) -> PrefillPlan:
        tables = self._load(prompts, counts)
        starts = self._copies_of(prefix, prompts, max(counts))
        length = 0 if prefix is None else len(prefix.token_ids)
        parts = self._parts(prompts, counts, starts, length)
        firsts = [
            row * self._capacity + start
            for row, own in zip(prompts, starts, strict=True)
            for start in own
        ]
        stale = [
            np.arange(count, min(self._capacity, whole_tiles(count + max_new_tokens, BLOCK_SIZE)))
            + row * self._capacity
            for row, count in zip(prompts, counts, strict=True)
        ]
        computed = sum(len(part.slots) for part in parts)
        return PrefillPlan(
            rows=tuple(prompts),
            counts=tuple(counts),
            tables=tables,
            inputs=self._inputs(prompts, counts, parts) if computed else None,
            copied_slots=torch.tensor(firsts)[:, None] + torch.arange(length) if firsts else None,
            stale_slots=torch.from_numpy(np.concatenate(stale)),
            decode_kernels=self._decode_kernels(prompts, counts, max_new_tokens),
            key_table=self._key_table(starts, length),
            computed_tokens=computed,
            copied_tokens=sum(counts) - computed,
        )

    def _copies_of(
        self, prefix: CachedPrefix | None, prompts: Mapping[int, Layout], num_keys: int
    ) -> list[list[int]]:
        """First slots of the copies of a prefix in each row; none in rows without the proof."""
        if prefix is None:
            return [[] for _ in prompts]
        starts = [prefix.starts_in(layout) for layout in prompts.values()]
        length = len(prefix.token_ids)
        spans = [
            (row, start, length) for row, own in zip(prompts, starts, strict=True) for start in own
        ]
        proofs = iter(self._are_causal(spans, prompts, num_keys))
        return [own if all([next(proofs) for _ in own]) else [] for own in starts]

    def _parts(
        self,
        prompts: Mapping[int, Layout],
        counts: Sequence[int],
        starts: Sequence[Sequence[int]],
        prefix_length: int,
    ) -> list[_Row]:
        """Divide each prompt into tokens to compute, and those that are written from others."""
        rows, layouts = list(prompts), list(prompts.values())
        # The cached prefix is copied anyway.
        least = MIN_PREFIX_TOKENS + (prefix_length if any(starts) else 0)
        shared = [] if self._changes_scores else shared_beginnings(layouts, counts, least)
        spans = [(rows[one.row], 0, one.length) for one in shared]
        spans += [(rows[one.donor], 0, one.length) for one in shared]
        proofs = self._are_causal(spans, prompts, max(counts))
        is_proved = [a and b for a, b in zip(proofs, proofs[len(shared) :], strict=False)]
        donors = {one.row: one for one, proved in zip(shared, is_proved, strict=True) if proved}
        parts: list[_Row | None] = [None] * len(rows)
        order = [one.row for one in shared if one.row in donors]
        done = 0
        for index in [*(i for i in range(len(rows)) if i not in donors), *order]:
            tokens = np.full(counts[index], -2, np.int32)
            if index in donors:
                donor = parts[donors[index].donor]
                assert donor is not None
                tokens[: donors[index].length] = donor.tokens[: donors[index].length]
            for start in starts[index]:
                tokens[start : start + prefix_length] = -1
            slots = np.flatnonzero(tokens == -2).astype(np.int32)
            tokens[slots] = np.arange(done, done + len(slots))
            done += len(slots)
            parts[index] = _Row(slots, tokens)
        return [part for part in parts if part is not None]

    def _are_causal(
        self,
        spans: Sequence[tuple[int, int, int]],
        layouts: Mapping[int, Layout],
        num_keys: int,
    ) -> list[bool]:
        """Return for each span ``(row, start, length)`` if it is proved to see only itself."""

        def prove(some: Sequence[tuple[int, int, int]]) -> list[bool]:
            rows, starts, lengths = torch.tensor(some).unbind(1)
            proofs = [
                spans_are_causal(mask_mod, rows, starts, lengths, num_keys, self._windows[kind])
                for kind, mask_mod in self._masks.items()
            ]
            proved: list[bool] = torch.stack(proofs).all(0).tolist()
            return proved

        claims = [(layouts[row].digest, *rest) for row, *rest in spans]
        return self._span_proofs.of(claims, spans, prove)

    def _decode_kernels(
        self, prompts: Mapping[int, Layout], counts: Sequence[int], max_new_tokens: int
    ) -> dict[str, DecodeKernel]:
        """Choose the kernel that decodes rows, by kind of layer.

        ``decode_attention`` serves rows that see every slot before them. It is chosen where the
        mask is proved to be causal for the slots of the fusion tail.
        """
        kernels: dict[str, DecodeKernel] = dict.fromkeys(self._masks, "flex_attention")
        if self._changes_scores or not max_new_tokens:
            return kernels
        self._batch.open_tail_of(torch.tensor(list(prompts)), torch.tensor(counts))
        places = list(zip(prompts, counts, strict=True))
        for kind, mask_mod in self._masks.items():

            def prove(some: Sequence[tuple[int, int]], mask_mod: MaskMod = mask_mod) -> list[bool]:
                rows, first_slots = torch.tensor(some).unbind(1)
                most = min(max_new_tokens, self._capacity - int(first_slots.min()))
                num_keys = min(self._capacity, int(first_slots.max()) + most)
                return rows_are_causal(mask_mod, rows, first_slots, most, num_keys).tolist()

            claims = [
                (kind, layout.digest, count, max_new_tokens)
                for layout, count in zip(prompts.values(), counts, strict=True)
            ]
            if all(self._row_proofs.of(claims, places, prove)):
                kernels[kind] = "decode_attention"
        return kernels

    def _inputs(
        self, prompts: Mapping[int, Layout], counts: Sequence[int], parts: Sequence[_Row]
    ) -> StreamInputs:
        """Lay the tokens to compute out as a stream, with the tiles in which they attend."""
        side = self._tile[0]
        num_tokens = sum(len(part.slots) for part in parts)
        token_ids = np.zeros(self._padded(num_tokens), np.int32)
        positions = np.zeros_like(token_ids)
        sources, slots, tile_slots, tile_tokens = [], [], [], []
        for (row, layout), part in zip(prompts.items(), parts, strict=True):
            computed = part.tokens[part.slots]
            token_ids[computed] = layout.token_tensor.numpy()[part.slots]
            positions[computed] = layout.position_tensor.numpy()[part.slots]
            written = np.flatnonzero(part.tokens >= 0)
            sources.append(part.tokens[written])
            slots.append(written + row * self._capacity)
            # The last query fills its tile.
            filled = np.arange(whole_tiles(len(computed), side)).clip(max=len(computed) - 1)
            tile_slots.append(part.slots[filled].reshape(-1, side))
            tile_tokens.append(computed[filled].reshape(-1, side))
        sizes = [len(own) for own in tile_slots]
        row_of_tile = np.repeat(np.array(list(prompts)), sizes)
        by_kind = {
            kind: self._widened(self._tile_indices(kind, prompts, counts, tile_slots), row_of_tile)
            for kind in self._masks
        }
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
        self,
        kind: str,
        prompts: Mapping[int, Layout],
        counts: Sequence[int],
        tile_slots: Sequence[Numbers],
    ) -> list[TileIndices]:
        """Find the key tiles that each tile of queries sees, prompt by prompt.

        Args:
            kind: The kind of layer.
            prompts: The layout of each prompt, by batch row.
            counts: Tokens of each whose keys are needed.
            tile_slots: ``(N, Q)`` slots of the queries of each prompt by tiles.
        """
        keys = [
            BlockMaskKey(
                self._strategy, layout.digest, self._windows[kind], slots.tobytes(), self._tile
            )
            for layout, slots in zip(prompts.values(), tile_slots, strict=True)
        ]
        found = {key: self._mask_cache.find(key) for key in dict.fromkeys(keys)}
        rows = list(prompts)
        index_of = {key: index for index, key in enumerate(keys) if len(tile_slots[index])}
        missing = [index for key, index in index_of.items() if found[key] is None]
        if missing:
            sizes = [len(tile_slots[index]) for index in missing]
            row_of = torch.tensor([rows[index] for index in missing])
            built = self._built_tiles(
                self._masks[kind],
                row_of.repeat_interleave(torch.tensor(sizes)),
                torch.from_numpy(np.concatenate([tile_slots[index] for index in missing])),
                whole_tiles(max(counts), self._tile[1]),
            )
            parts = zip(*(tensor.split(sizes) for tensor in built), strict=True)
            for index, part in zip(missing, parts, strict=True):
                columns = -(-counts[index] // self._tile[1])
                num, indices, num_full, full = part
                tiles = TileIndices(
                    num.clone(),
                    indices[:, :columns].clone(),
                    num_full.clone(),
                    full[:, :columns].clone(),
                )
                found[keys[index]] = tiles
                self._mask_cache.keep(keys[index], tiles)
        return [found[key] or _no_tiles() for key in keys]

    def _built_tiles(
        self, mask_mod: MaskMod, row_of: Tensor, slot_of: Tensor, num_keys: int
    ) -> TileIndices:
        """Build the key tiles of ``N`` query tiles in ``row_of`` ``(N,)``.

        Each tile of queries is a batch row of the mask that is built, so a prompt takes as many as
        it has, and its queries ``slot_of`` ``(N, Q)`` need not be neighbours.
        """

        def of_tiles(t: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return mask_mod(row_of[t], h, slot_of[t, q_idx], kv_idx)

        side = self._tile[0]
        mask = create_block_mask(
            of_tiles, len(row_of), None, side, num_keys, CPU, self._tile, pointwise_only=True
        )
        assert mask.full_kv_num_blocks is not None
        assert mask.full_kv_indices is not None
        return TileIndices(
            mask.kv_num_blocks[:, 0, 0],
            mask.kv_indices[:, 0, 0],
            mask.full_kv_num_blocks[:, 0, 0],
            mask.full_kv_indices[:, 0, 0],
        )

    @property
    def most_tiles(self) -> int:
        """Most tiles of queries that a plan has."""
        return self._padded_tiles(self._batch.segment_ids.numel() // self._tile[0])

    def _padded_tiles(self, count: int) -> int:
        side = self._tile[0]
        return whole_tiles(self._padded(max(MIN_TILES, count) * side), side) // side

    def _padded(self, length: int) -> int:
        return padded_length(length, on_gpu=self._on_gpu)

    def _key_table(
        self,
        starts: Sequence[Sequence[int]],
        length: int,
    ) -> KeyTable | None:
        """List the key slots of each row: one copy of the cached prefix, then all other slots.

        The spare row behind all others holds the prefix for all rows, from slot 0 on.

        Example:
            With a prefix of 2 tokens at slots 0 and 3 of a row of 6 tokens: slots 0 1 2 5 6 7 …
        """
        if not self._with_key_table:
            return None
        key_slots = torch.arange(self._capacity, dtype=torch.int32).repeat(len(starts), 1)
        sharing = torch.zeros(len(starts), 3, dtype=torch.int32)
        spare = len(self._batch.segment_ids)
        for index, own in enumerate(starts):
            if own:
                is_own = np.ones(self._capacity, bool)
                for start in own:
                    is_own[start : start + length] = False
                keys = np.concatenate((np.arange(length), np.flatnonzero(is_own)))
                key_slots[index, : len(keys)] = _tensor(keys)
                sharing[index] = torch.tensor((spare, length, len(own)))
        return KeyTable(key_slots, sharing)


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
