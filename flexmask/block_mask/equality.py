"""Proves that two masks are equal, or that a mask is as simple as a fast path needs it.

Intervals decide most claims without looking at pairs (`regions`). The others are decided through
the BlockMask of the difference of two masks, for which pairs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flexmask.block_mask.create import create_block_mask
from flexmask.block_mask.regions import Regions, joined, region_values
from flexmask.mod_types import MaskMod

PROOF_TILE = (32, 128)
"""Queries and keys of a tile. Of the tiles on a diagonal every pair is compared, and small ones
hold fewer of them."""


def masks_are_equal(
    first: MaskMod, second: MaskMod, B: int, Q_LEN: int, KV_LEN: int, device: torch.device
) -> bool:
    """Return True if two masks that do not depend on the head allow the same pairs.

    Arguments and errors are those of `rows_are_equal`.
    """
    return bool(rows_are_equal(first, second, B, Q_LEN, KV_LEN, device).all())


def rows_are_equal(
    first: MaskMod, second: MaskMod, B: int, Q_LEN: int, KV_LEN: int, device: torch.device
) -> Tensor:
    """Return for each batch row whether two masks allow the same pairs, ``(B,)`` bool.

    The BlockMask of their difference has no tiles if and only if they are equal.

    Args:
        first: A mask, the same for all heads.
        second: Another mask.
        B: Number of batch rows.
        Q_LEN: Number of queries.
        KV_LEN: Number of keys.
        device: Device of the tensors that the masks capture.

    Raises:
        MaskError: If a mask_mod breaks a rule of FlexAttention.
    """

    def differs(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return first(b, h, q_idx, kv_idx) ^ second(b, h, q_idx, kv_idx)

    tiles = create_block_mask(differs, B, None, Q_LEN, KV_LEN, device, PROOF_TILE)
    assert tiles.full_kv_num_blocks is not None
    return (tiles.kv_num_blocks + tiles.full_kv_num_blocks).sum((1, 2)) == 0


def rows_are_causal(
    mask_mod: MaskMod, rows: Tensor, first_slots: Tensor, num_queries: int, KV_LEN: int
) -> Tensor:
    """Return for each row whether queries from a slot on see every slot up to their own.

    Args:
        mask_mod: The mask over slots, the same for all heads.
        rows: ``(N,)`` batch rows.
        first_slots: ``(N,)`` slot of the first query of each of them.
        num_queries: Queries of each; those beyond the last slot are left out.
        KV_LEN: Number of slots.

    Returns:
        ``(N,)`` bool.

    Raises:
        MaskError: If the mask_mod breaks a rule of FlexAttention.
    """
    last_slots = (first_slots + num_queries - 1).clamp(max=KV_LEN - 1)
    queries = torch.stack((first_slots, last_slots), 1)
    # A row whose first query is in slot 0 has no keys before; its own first pair stands for them.
    before = torch.stack((torch.zeros_like(first_slots), (first_slots - 1).clamp(min=0)), 1)
    until = torch.where(first_slots[:, None] > 0, queries, 0)
    certain, _ = region_values(
        mask_mod,
        joined(Regions.below_diagonal(rows, queries), Regions.rectangles(rows, until, before)),
    )
    is_proved = certain.view(2, -1).all(0)
    furthest = Regions.rectangles(
        rows, last_slots[:, None].expand(-1, 2), torch.zeros_like(queries)
    )
    return _or_compared(
        mask_mod,
        is_proved,
        furthest,
        lambda open_: _causal_pairs(
            mask_mod, rows[open_], first_slots[open_], num_queries, KV_LEN
        ),
    )


def _causal_pairs(
    mask_mod: MaskMod, rows: Tensor, first_slots: Tensor, num_queries: int, KV_LEN: int
) -> Tensor:
    """Compare the pairs of `rows_are_causal`."""

    def slot_of(r: Tensor, q_idx: Tensor) -> Tensor:
        return (first_slots[r] + q_idx).clamp(max=KV_LEN - 1)

    def sees(r: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        slot = slot_of(r, q_idx)
        return mask_mod(rows[r], h, slot, kv_idx) & (kv_idx <= slot)

    def up_to_own(r: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= slot_of(r, q_idx)

    return rows_are_equal(sees, up_to_own, len(rows), num_queries, KV_LEN, rows.device)


def spans_see(
    mask_mod: MaskMod,
    rows: Tensor,
    spans: Tensor,
    seen: Sequence[Sequence[tuple[int, int]]],
    num_keys: Tensor,
) -> Tensor:
    """Return for each span of slots whether it sees itself, causally, and given slots before it.

    Intervals decide it for most masks; where they do not, all pairs are compared.

    Args:
        mask_mod: The mask over slots, the same for all heads.
        rows: ``(N,)`` batch row of each span.
        spans: ``(N, 2)`` first and last slot of each.
        seen: For each span the slots before it that all of its tokens should see, as ``(first,
            last)`` of slots that lie side by side, in order.
        num_keys: ``(N,)`` number of slots of each row that hold tokens.

    Returns:
        ``(N,)`` bool.

    Raises:
        MaskError: If the mask_mod breaks a rule of FlexAttention.
    """
    others = [
        (index, *keys, is_seen)
        for index, (span, before) in enumerate(zip(spans.tolist(), seen, strict=True))
        for keys, is_seen in _others(span, before, int(num_keys[index]))
    ]
    index, first, last, is_seen = torch.tensor(others, dtype=torch.int64).view(-1, 4).unbind(1)
    long = (spans[:, 1] > spans[:, 0]).nonzero()[:, 0]
    certain, possible = region_values(
        mask_mod,
        joined(
            Regions.below_diagonal(rows, spans),
            Regions.above_diagonal(rows[long], spans[long]),
            Regions.rectangles(rows[index], spans[index], torch.stack((first, last), 1)),
        ),
    )
    span_of = torch.cat((torch.arange(len(rows)), long, index))
    should_see = torch.cat((torch.ones(len(rows)), torch.zeros(len(long)), is_seen)).bool()
    is_proved = torch.ones(len(rows), dtype=torch.bool)
    is_proved[span_of[~torch.where(should_see, certain, ~possible)]] = False

    def compared(open_: Tensor) -> Tensor:
        before = [seen[index] for index in open_.tolist()]
        return _seen_pairs(mask_mod, rows[open_], spans[open_], before, num_keys[open_])

    furthest = Regions.rectangles(rows, spans[:, [1, 1]], spans[:, [0, 0]])
    return _or_compared(mask_mod, is_proved, furthest, compared)


def _others(
    span: Sequence[int], seen: Sequence[tuple[int, int]], num_keys: int
) -> Iterator[tuple[tuple[int, int], bool]]:
    """Divide the slots outside a span into those that it should see and the others."""
    start = 0
    for first, last in seen:
        if start < first:
            yield (start, first - 1), False
        yield (first, last), True
        start = last + 1
    if start < span[0]:
        yield (start, span[0] - 1), False
    if span[1] + 1 < num_keys:
        yield (span[1] + 1, num_keys - 1), False


def _seen_pairs(
    mask_mod: MaskMod,
    rows: Tensor,
    spans: Tensor,
    seen: Sequence[Sequence[tuple[int, int]]],
    num_keys: Tensor,
) -> Tensor:
    """Compare the pairs of `spans_see`."""
    first, last = spans.unbind(1)
    most_keys = int(num_keys.max())
    is_seen = torch.zeros(len(rows), most_keys, dtype=torch.bool)
    for index, before in enumerate(seen):
        for start, stop in before:
            is_seen[index, start : stop + 1] = True

    def slot_of(r: Tensor, q_idx: Tensor) -> Tensor:
        return torch.minimum(first[r] + q_idx, last[r])

    def sees(r: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(rows[r], h, slot_of(r, q_idx), kv_idx) & (kv_idx < num_keys[r])

    def should_see(r: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return is_seen[r, kv_idx] | (kv_idx >= first[r]) & (kv_idx <= slot_of(r, q_idx))

    longest = int((last - first).max()) + 1
    return rows_are_equal(sees, should_see, len(rows), longest, most_keys, rows.device)


def _or_compared(
    mask_mod: MaskMod,
    is_proved: Tensor,
    furthest: Regions,
    compare: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return which claims hold, given by intervals or else by a comparison of pairs.

    Args:
        mask_mod: The mask.
        is_proved: ``(N,)`` claims that intervals have proved.
        furthest: A pair for each claim that it says to be allowed; where it is not, nothing needs
            to be compared.
        compare: Compares the pairs of some claims.
    """
    if bool(is_proved.all()):
        return is_proved
    is_possible = region_values(mask_mod, furthest)[1]
    left_open = (is_possible & ~is_proved).nonzero()[:, 0]
    if not len(left_open):
        return is_proved
    return is_proved.index_copy(0, left_open, compare(left_open))
