"""The plan of a prefill, made on the host while the device computes another batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flexmask.attention.flex_call import TileOrder, last_tile_first
from flexmask.engine.prefill_kernel import BLOCK_SIZE, Tile
from flexmask.kernels.decode_attention import KeyTable
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutTables, layout_tables

TOKEN_MULTIPLE = 16
"""The tokens of a row to compute are padded to a multiple of this, for fast matrix products."""


def prefill_length(num_tokens: int, side: int = BLOCK_SIZE) -> int:
    """Round ``num_tokens`` up to the slots of whole tiles, at least two of them.

    A single tile would specialise the graph on a dimension of one, and other lengths would
    compile another graph.
    """
    return max(2, -(-num_tokens // side)) * side


@dataclass(frozen=True)
class PrefillPlan:
    """The plan of a prefill: the tokens to compute and their slots. All tensors are on the CPU.

    `plan_prefill` makes it.

    Attributes:
        layouts: The layout of each row.
        counts: Prompt tokens of each row whose keys and values are needed.
        starts: For each row that is computed, the slots at which the cached prefix is copied.
            Further rows only fill the batch.
        cached_tokens: Tokens of the cached prefix.
        tile: Queries and keys of a tile; the numbers of queries and keys are multiples of these.
        tables: Segment ids and positions of the batch.
        input_ids: ``(R, T)`` tokens to compute in ``R`` rows, padded.
        token_slots: ``(R, T)`` slots of these tokens.
        tile_order: The order in which their queries attend, in whole tiles.
        query_slots: ``(R, Q)`` slots of the queries in this order.
        computed_tokens: Tokens to compute in each of these rows, padding not counted.
        key_table: Slots of the keys of each row once the prefix is copied; None if decoding does
            not use a table.
    """

    layouts: tuple[Layout, ...]
    counts: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    cached_tokens: int
    tile: Tile
    tables: LayoutTables
    input_ids: Tensor
    token_slots: Tensor
    tile_order: TileOrder
    query_slots: Tensor
    computed_tokens: tuple[int, ...]
    key_table: KeyTable | None

    @cached_property
    def kv_length(self) -> int:
        """Slots that queries may see: the tokens of the longest row, rounded up to whole tiles."""
        return prefill_length(max(self.counts), self.tile[1])


def plan_prefill(
    layouts: Sequence[Layout],
    counts: Sequence[int],
    starts: Sequence[Sequence[int]],
    cached_tokens: int,
    *,
    batch_size: int,
    capacity: int,
    tile: Tile,
    with_key_table: bool,
) -> PrefillPlan:
    """Plan to compute the first ``counts[b]`` tokens of each layout, except the cached prefix.

    Rows beyond ``starts`` are laid out and not computed.

    Args:
        layouts: The layout of each row, at most ``batch_size``.
        counts: Tokens of each row whose keys and values are needed.
        starts: For each row that is computed, the slots at which the cached prefix is copied.
        cached_tokens: Tokens of the cached prefix.
        batch_size: Rows of the cache.
        capacity: Slots per row.
        tile: Queries and keys of a tile.
        with_key_table: Let decoding read keys through a table.

    Raises:
        LayoutError: If there are more layouts than rows, or one does not fit.
    """
    slots = [
        _slots_outside(count, row_starts, cached_tokens)
        for count, row_starts in zip(counts, starts, strict=False)
    ]
    most = max(map(len, slots))
    # At least one, because no graph takes zero tokens: the cached prefix may be all there is.
    num_tokens = max(1, -(-most // TOKEN_MULTIPLE)) * TOKEN_MULTIPLE
    num_queries = prefill_length(most, tile[0])
    input_ids = torch.zeros(len(starts), num_tokens, dtype=torch.long)
    in_order = torch.empty(len(starts), num_queries, dtype=torch.long)
    offsets = torch.arange(num_queries)
    for row, (layout, computed) in enumerate(zip(layouts, slots, strict=False)):
        size = len(computed)
        input_ids[row, :size] = layout.token_tensor[computed]
        in_order[row, :size] = computed
        # Padding is written to slots that hold no token yet.
        in_order[row, size:] = counts[row] + offsets[: num_queries - size]
    in_order.clamp_(max=capacity - 1)
    all_by_tiles = last_tile_first(num_queries, num_queries, tile[0]).queries
    # A copy, because a view keeps the strides of all queries, which would need another graph.
    token_slots = in_order[:, :num_tokens].clone(memory_format=torch.contiguous_format)
    return PrefillPlan(
        layouts=tuple(layouts),
        counts=tuple(counts),
        starts=tuple(map(tuple, starts)),
        cached_tokens=cached_tokens,
        tile=tile,
        tables=layout_tables(layouts, counts, [0] * len(layouts), batch_size, capacity),
        input_ids=input_ids,
        token_slots=token_slots,
        tile_order=last_tile_first(num_tokens, num_queries, tile[0]),
        query_slots=in_order[:, all_by_tiles],
        computed_tokens=tuple(map(len, slots)),
        key_table=_key_table(counts, starts, cached_tokens, slots, batch_size, capacity)
        if with_key_table
        else None,
    )


def _key_table(
    counts: Sequence[int],
    starts: Sequence[Sequence[int]],
    cached_tokens: int,
    slots: Sequence[Tensor],
    batch_size: int,
    capacity: int,
) -> KeyTable:
    """List the key slots of each row: one copy of the cached prefix, then all other slots.

    Example:
        With a prefix of 2 tokens at slots 0 and 3 of a row of 6 tokens: slots 0 1 2 5 6 7 …
    """
    key_slots = torch.arange(capacity, dtype=torch.int32).repeat(batch_size, 1)
    sharing = torch.zeros(batch_size, 3, dtype=torch.int32)
    holders = [row for row, own in enumerate(starts) if own]
    for row in holders:
        first = starts[holders[0]][0]
        prefix = torch.arange(first, first + cached_tokens)
        following = torch.arange(counts[row], capacity)
        keys = torch.cat((prefix, slots[row], following))
        key_slots[row, : len(keys)] = keys
        sharing[row] = torch.tensor((holders[0], cached_tokens, len(starts[row])))
    return KeyTable(key_slots, sharing)


def _slots_outside(count: int, starts: Sequence[int], length: int) -> Tensor:
    """The first ``count`` slots, except spans of ``length`` slots that begin at ``starts``."""
    is_computed = torch.ones(count, dtype=torch.bool)
    for start in starts:
        is_computed[start : start + length] = False
    return is_computed.nonzero()[:, 0]
