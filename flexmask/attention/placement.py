"""The places of queries and keys: the batch row and slot behind each index that a kernel sees.

Masks, changes of scores and scaled parts are functions of batch rows and slots. The kernels of
FlexAttention number queries and keys in their own way, so each function is translated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from flexmask.torch_internals import mark_static

if TYPE_CHECKING:
    from flexmask.mod_types import MaskMod, ScoreMod

Place = tuple[Tensor, Tensor]
"""A batch row and a slot of it."""


class Placement(Protocol):
    """The places of the queries and keys of a kernel; its tensors are buffers that stay."""

    @property
    def shape(self) -> tuple[int, int]:
        """Largest batch dimension and number of queries."""

    def query(self, b: Tensor, q_idx: Tensor) -> Place:
        """Return the place of a query."""

    def key(self, b: Tensor, kv_idx: Tensor) -> Place:
        """Return the place of a key."""


@dataclass(frozen=True)
class RowPlacement:
    """Each batch row by itself: queries at given slots, keys in the order of the slots.

    Attributes:
        slots: ``(B, Q)`` slot of each query.
    """

    slots: Tensor

    def __post_init__(self) -> None:
        """Make the sizes constants, for FlexAttention's CPU kernel (see `LayoutBatch`)."""
        mark_static(self.slots)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and queries of a row."""
        rows, queries = self.slots.shape
        return rows, queries

    def query(self, b: Tensor, q_idx: Tensor) -> Place:
        """Return row ``b`` and the slot of its query."""
        return b, self.slots[b, q_idx]

    def key(self, b: Tensor, kv_idx: Tensor) -> Place:
        """Return row ``b`` and slot ``kv_idx``."""
        return b, kv_idx


@dataclass(frozen=True)
class TilePlacement:
    """Tiles of queries, each of one row, and the slots of all rows as one axis of keys.

    Each tile is a batch entry of the kernel, so its row is one number for all of its pairs, and
    what a mask looks up depends on the query or on the key alone. With rows of 4 slots, key 6 is
    slot 2 of row 1.

    Attributes:
        rows: ``(N,)`` row of each tile.
        slots: ``(N, Q)`` slots of its queries.
        capacity: Slots of a row.
    """

    rows: Tensor
    slots: Tensor
    capacity: int

    def __post_init__(self) -> None:
        """Make the sizes constants, for FlexAttention's CPU kernel (see `LayoutBatch`)."""
        mark_static(self.rows)
        mark_static(self.slots)

    @property
    def shape(self) -> tuple[int, int]:
        """Tiles, and queries of a tile."""
        tiles, queries = self.slots.shape
        return tiles, queries

    def query(self, b: Tensor, q_idx: Tensor) -> Place:
        """Return the row of tile ``b`` and the slot of one of its queries."""
        return self.rows[b], self.slots[b, q_idx]

    def key(self, b: Tensor, kv_idx: Tensor) -> Place:
        """Return the row and the slot at an index of the axis of keys."""
        return kv_idx // self.capacity, kv_idx % self.capacity


@dataclass(frozen=True)
class FlatTilePlacement(TilePlacement):
    """The same tiles one after the other, as one batch entry.

    FlexAttention's FLASH backend takes no axis of keys that several batch entries share.
    """

    def query(self, b: Tensor, q_idx: Tensor) -> Place:
        """Return the row and the slot of a query, counted over all tiles."""
        side = self.slots.shape[1]
        tile = q_idx // side
        return self.rows[tile], self.slots[tile, q_idx % side]


def placed_mask(mask_mod: MaskMod, placement: Placement) -> MaskMod:
    """Translate a mask over slots; rows do not see each other."""

    def placed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row, q_slot = placement.query(b, q_idx)
        key_row, kv_slot = placement.key(b, kv_idx)
        return mask_mod(row, h, q_slot, kv_slot) & (row == key_row)

    return placed


def placed_score(score_mod: ScoreMod | None, placement: Placement) -> ScoreMod | None:
    """Translate a change of scores over slots."""
    if score_mod is None:
        return None

    def placed(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row, q_slot = placement.query(b, q_idx)
        return score_mod(score, row, h, q_slot, placement.key(b, kv_idx)[1])

    return placed
