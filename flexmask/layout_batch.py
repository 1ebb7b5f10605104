"""A batch of layouts on the device, in buffers that masks capture.

The buffers stay in place while their content changes from batch to batch, so a compiled kernel
that captured them is not compiled again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexmask.errors import LayoutError
from flexmask.layout import PADDING, TAIL, Layout
from flexmask.torch_internals import mark_static

CPU = torch.device("cpu")


class LayoutBatch:
    """Segment ids and positions of a batch of ``B`` rows of ``capacity`` slots.

    Attributes:
        segment_ids: ``(B, capacity)`` int32; `PADDING` where a slot holds no token.
        position_ids: ``(B, capacity)`` int32; after the prompt, those of generated tokens.
    """

    def __init__(self, batch_size: int, capacity: int, device: torch.device) -> None:
        """Allocate the buffers, with padding in every slot."""
        shape = (batch_size, capacity)
        self.segment_ids = torch.full(shape, PADDING, dtype=torch.int32, device=device)
        self.position_ids = torch.zeros(shape, dtype=torch.int32, device=device)
        # Flex's CPU kernel does not compile with captured tensors of symbolic size (torch 2.13).
        mark_static(self.segment_ids)
        mark_static(self.position_ids)

    @cached_property
    def choices(self) -> ChoiceTables:
        """The choices behind the prompts, in buffers too; allocated when a mask asks for them."""
        batch_size, capacity = self.segment_ids.shape
        tables = _without_choices(batch_size, capacity, self.device)
        for buffer in tables:
            mark_static(buffer)
        return tables

    @property
    def device(self) -> torch.device:
        """Device of the buffers, and of all tensors that a mask may capture."""
        return self.segment_ids.device

    def table(self, values: Sequence[Any] | Tensor) -> Tensor:
        """Make a constant table for a mask to capture and index.

        The sizes of the table are constants of the compiled kernel, as those of the buffers are.

        Args:
            values: Numbers or bools, as a tensor or as nested lists.
        """
        table = torch.as_tensor(values, device=self.device)
        mark_static(table)
        return table

    def load(
        self, layouts: Sequence[Layout], num_tokens: Sequence[int], starts: Sequence[int]
    ) -> None:
        """Load the first ``num_tokens[b]`` tokens of each layout, from slot ``starts[b]`` on.

        Rows without a layout are all padding.

        Raises:
            LayoutError: If there are more than ``B`` layouts, or one needs more slots.
        """
        self.copy_from(layout_tables(layouts, num_tokens, starts, *self.segment_ids.shape))

    def copy_from(self, tables: LayoutTables) -> None:
        """Load tables that `layout_tables` made for a batch of this shape."""
        self.segment_ids.copy_(tables.segment_ids)
        self.position_ids.copy_(tables.position_ids)
        if tables.choices is not None:
            for buffer, content in zip(self.choices, tables.choices, strict=True):
                buffer.copy_(content)

    def load_rows(self, rows: Tensor, tables: LayoutTables) -> None:
        """Load tables of ``N`` rows into ``rows``, ``(N,)`` indices on the device."""
        pairs = [
            (self.segment_ids, tables.segment_ids),
            (self.position_ids, tables.position_ids),
        ]
        if tables.choices is not None:
            pairs += zip(self.choices, tables.choices, strict=True)
        for buffer, content in pairs:
            buffer.index_copy_(0, rows, content.to(self.device, non_blocking=True))

    def open_tail(self, first_slots: Sequence[int] | Tensor) -> None:
        """Mark the slots from ``first_slots[b]`` on as fusion tail, for tokens to be generated."""
        rows = torch.arange(len(self.segment_ids), device=self.device)
        self.open_tail_of(rows, torch.as_tensor(first_slots, device=self.device))

    def open_tail_of(self, rows: Tensor, first_slots: Tensor) -> None:
        """Mark slots as fusion tail: those of ``rows[n]`` from ``first_slots[n]`` on."""
        ids = self.segment_ids[rows]
        slots = torch.arange(ids.shape[1], device=self.device)
        is_tail = slots >= first_slots[:, None]
        self.segment_ids.index_copy_(0, rows, ids.masked_fill_(is_tail, TAIL))

    def positions_at(self, slots: Tensor) -> Tensor:
        """Return the position of one slot per row: ``(B, 1)`` positions of ``(B,)`` slots."""
        return self.position_ids.gather(1, slots[:, None]).long()


class ChoiceTables(NamedTuple):
    """Choices that continue prompts, for each slot of each row.

    Attributes:
        choice_ids: ``(B, capacity)`` int32: the number of the token's choice, from 1; 0 where
            there is none.
        tail_slots: ``(B, capacity)`` int32: the slot that the token would have if its choice were
            the only one; its own slot where there is none.
    """

    choice_ids: Tensor
    tail_slots: Tensor


class LayoutTables(NamedTuple):
    """The content of a `LayoutBatch`, on the CPU.

    Attributes:
        segment_ids: ``(B, capacity)`` int32.
        position_ids: ``(B, capacity)`` int32.
        choices: The choices; None if no layout has any.
    """

    segment_ids: Tensor
    position_ids: Tensor
    choices: ChoiceTables | None = None


def layout_tables(
    layouts: Sequence[Layout],
    num_tokens: Sequence[int],
    starts: Sequence[int],
    batch_size: int,
    capacity: int,
) -> LayoutTables:
    """Make the content of a `LayoutBatch` of ``batch_size`` rows of ``capacity`` slots.

    Args:
        layouts: The layouts of the first rows.
        num_tokens: Tokens of each layout to load, from its first one on.
        starts: Slot of the first token of each layout.
        batch_size: Rows.
        capacity: Slots per row.

    Raises:
        LayoutError: If there are more layouts than rows, or one needs more slots.
    """
    if len(layouts) > batch_size:
        raise LayoutError(f"there is room for {batch_size} layouts, got {len(layouts)}")
    segment_ids = torch.full((batch_size, capacity), PADDING, dtype=torch.int32)
    position_ids = torch.zeros((batch_size, capacity), dtype=torch.int32)
    slots = torch.arange(capacity, dtype=torch.int32)
    for row, (layout, count, start) in enumerate(zip(layouts, num_tokens, starts, strict=True)):
        stop = start + len(layout)
        if stop > capacity:
            raise LayoutError(f"row {row} needs {stop} slots, got {capacity}")
        segment_ids[row, start : start + count] = layout.segment_tensor[:count]
        torch.add(slots, layout.next_position - stop, out=position_ids[row])
        position_ids[row, :start] = 0
        position_ids[row, start:stop] = layout.position_tensor
    has_choices = any(layout.choice_lengths for layout in layouts)
    choices = _without_choices(batch_size, capacity, CPU) if has_choices else None
    if choices is not None:
        for row, (layout, start) in enumerate(zip(layouts, starts, strict=True)):
            own = slice(start, start + len(layout))
            choices.choice_ids[row, own] = layout.choice_tensor
            choices.tail_slots[row, own] = layout.tail_slot_tensor + start
    return LayoutTables(segment_ids, position_ids, choices)


def _without_choices(batch_size: int, capacity: int, device: torch.device) -> ChoiceTables:
    shape = (batch_size, capacity)
    slots = torch.arange(capacity, dtype=torch.int32, device=device)
    return ChoiceTables(
        torch.zeros(shape, dtype=torch.int32, device=device), slots.repeat(batch_size, 1)
    )
