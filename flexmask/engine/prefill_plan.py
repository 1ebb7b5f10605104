"""What a prefill computes, worked out on the host while the device is busy with another batch."""

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
"""Tokens of a row that are computed are padded to a multiple: what matrix products like."""


def prefill_length(num_tokens: int, side: int = BLOCK_SIZE) -> int:
    """Number of slots that ``num_tokens`` are padded to: whole tiles, and two at least.

    One tile would specialise the graph on a dimension of one, and two lengths would compile
    twice.
    """
    return max(2, -(-num_tokens // side)) * side


@dataclass(frozen=True)
class PrefillPlan:
    """Which tokens of a batch are computed, and where they go; all tensors on the CPU.

    Attributes:
        layouts: One per row.
        counts: Tokens of each row whose keys and values are wanted.
        starts: Slots at which a shared prefix stands, which is copied, in each row that is
            computed; rows beyond only fill the batch.
        shared_length: Tokens of that prefix.
        tile: Queries and keys of a tile, of which their numbers are multiples.
        tables: Segment ids and positions of the batch.
        input_ids: ``(R, T)`` tokens to compute in ``R`` rows, padded.
        token_slots: ``(R, T)`` their slots.
        tile_order: The order in which they attend, as queries in whole tiles.
        query_slots: ``(R, Q)`` slots in this order.
        computed_tokens: How many of each of these rows are no padding.
        key_table: Where keys lie once the prefix is copied, for `batch_size` rows; None if it is
            not wanted.
    """

    layouts: tuple[Layout, ...]
    counts: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    shared_length: int
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
        """Slots that queries may see: as many as the longest row has tokens, in whole tiles."""
        return prefill_length(max(self.counts), self.tile[1])


def plan_prefill(
    layouts: Sequence[Layout],
    counts: Sequence[int],
    starts: Sequence[Sequence[int]],
    shared_length: int,
    *,
    batch_size: int,
    capacity: int,
    tile: Tile,
    with_key_table: bool,
) -> PrefillPlan:
    """Plan to compute the first ``counts[b]`` tokens of each layout, but for a shared prefix.

    Rows beyond ``starts`` are laid out and not computed.

    Args:
        layouts: One per row, ``batch_size`` at most.
        counts: Tokens of each that are wanted.
        starts: Slots of each row that is computed at which the shared prefix stands.
        shared_length: Its tokens.
        batch_size: Rows of the cache.
        capacity: Slots of each.
        tile: Queries and keys of a tile.
        with_key_table: Whether decoding reads keys through a table.

    Raises:
        LayoutError: If there are more layouts than rows, or one does not fit.
    """
    slots = [
        _slots_outside(count, row_starts, shared_length)
        for count, row_starts in zip(counts, starts, strict=False)
    ]
    most = max(map(len, slots))
    # Where a prefix is all there is, nothing is left to compute; no graph takes no tokens.
    num_tokens = max(1, -(-most // TOKEN_MULTIPLE)) * TOKEN_MULTIPLE
    num_queries = prefill_length(most, tile[0])
    input_ids = torch.zeros(len(starts), num_tokens, dtype=torch.long)
    in_order = torch.empty(len(starts), num_queries, dtype=torch.long)
    places = torch.arange(num_queries)
    for row, (layout, computed) in enumerate(zip(layouts, slots, strict=False)):
        size = len(computed)
        input_ids[row, :size] = layout.token_tensor[computed]
        in_order[row, :size] = computed
        # What pads a row goes to slots that hold no token yet.
        in_order[row, size:] = counts[row] + places[: num_queries - size]
    in_order.clamp_(max=capacity - 1)
    all_by_tiles = last_tile_first(num_queries, num_queries, tile[0]).queries
    # A copy, since a row alone would keep the strides of all queries, and need another graph.
    token_slots = in_order[:, :num_tokens].clone(memory_format=torch.contiguous_format)
    return PrefillPlan(
        layouts=tuple(layouts),
        counts=tuple(counts),
        starts=tuple(map(tuple, starts)),
        shared_length=shared_length,
        tile=tile,
        tables=layout_tables(layouts, counts, [0] * len(layouts), batch_size, capacity),
        input_ids=input_ids,
        token_slots=token_slots,
        tile_order=last_tile_first(num_tokens, num_queries, tile[0]),
        query_slots=in_order[:, all_by_tiles],
        computed_tokens=tuple(map(len, slots)),
        key_table=_key_table(counts, starts, shared_length, slots, batch_size, capacity)
        if with_key_table
        else None,
    )


def _key_table(
    counts: Sequence[int],
    starts: Sequence[Sequence[int]],
    shared_length: int,
    slots: Sequence[Tensor],
    batch_size: int,
    capacity: int,
) -> KeyTable:
    """List the shared prefix, where there is one, then what is computed, then what follows.

    With a prefix of 2 tokens at slots 0 and 3 of a row of 6 tokens, slots 0 1 2 5 6 7 …
    """
    key_slots = torch.arange(capacity, dtype=torch.int32).repeat(batch_size, 1)
    sharing = torch.zeros(batch_size, 3, dtype=torch.int32)
    holders = [row for row, own in enumerate(starts) if own]
    for row in holders:
        first = starts[holders[0]][0]
        prefix = torch.arange(first, first + shared_length)
        following = torch.arange(counts[row], capacity)
        keys = torch.cat((prefix, slots[row], following))
        key_slots[row, : len(keys)] = keys
        sharing[row] = torch.tensor((holders[0], shared_length, len(starts[row])))
    return KeyTable(key_slots, sharing)


def _slots_outside(count: int, starts: Sequence[int], length: int) -> Tensor:
    """The first ``count`` slots but for runs of ``length`` from each of ``starts`` on."""
    is_computed = torch.ones(count, dtype=torch.bool)
    for start in starts:
        is_computed[start : start + length] = False
    return is_computed.nonzero()[:, 0]
