"""A batch of layouts on the device, in buffers that masks capture.

The buffers stay in place while their content changes from batch to batch, so a compiled kernel
that captured them is not compiled again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
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
        indices_in_segments: ``(B, capacity)`` int32; the number of tokens of the same segment id
            before each token. Generated tokens continue the fusion tail.
    """

    def __init__(self, batch_size: int, capacity: int, device: torch.device) -> None:
        """Allocate the buffers, with padding in every slot."""
        shape = (batch_size, capacity)
        self.segment_ids = torch.full(shape, PADDING, dtype=torch.int32, device=device)
        self.position_ids = torch.zeros(shape, dtype=torch.int32, device=device)
        self.indices_in_segments = torch.zeros(shape, dtype=torch.int32, device=device)
        # Flex's CPU kernel does not compile with captured tensors of symbolic size (torch 2.13).
        for buffer in (self.segment_ids, self.position_ids, self.indices_in_segments):
            mark_static(buffer)
        self._choices: ChoiceTables | None = None

    @property
    def buffers(self) -> LayoutTables:
        """All buffers; those of choices only if a mask has asked for them."""
        return LayoutTables(
            self.segment_ids, self.position_ids, self.indices_in_segments, self._choices
        )

    @property
    def choices(self) -> ChoiceTables:
        """The choices behind the prompts, in buffers too; allocated when a mask asks for them."""
        if self._choices is None:
            self._choices = _without_choices(self.segment_ids.shape, self.device)
            for buffer in self._choices:
                mark_static(buffer)
        return self._choices

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
        for buffer, content in self._with_buffers(tables):
            buffer.copy_(content)

    def load_rows(self, rows: Tensor, tables: LayoutTables) -> None:
        """Load tables of ``N`` rows into ``rows``, ``(N,)`` indices on the device."""
        for buffer, content in self._with_buffers(tables):
            buffer.index_copy_(0, rows, content.to(self.device, non_blocking=True))

    def _with_buffers(self, tables: LayoutTables) -> list[tuple[Tensor, Tensor]]:
        """Pair the buffers with tables; rows without choices replace those of earlier rows."""
        choices = tables.choices
        if choices is None and self._choices is not None:
            choices = _without_choices(tables.segment_ids.shape, tables.segment_ids.device)
        own = (self.segment_ids, self.position_ids, self.indices_in_segments)
        pairs = list(zip(own, tables[:3], strict=True))
        if choices is not None:
            pairs += zip(self.choices, choices, strict=True)
        return pairs

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
    """The content of a `LayoutBatch`.

    Attributes:
        segment_ids: ``(B, capacity)`` int32.
        position_ids: ``(B, capacity)`` int32.
        indices_in_segments: ``(B, capacity)`` int32.
        choices: The choices; None if no layout has any.
    """

    segment_ids: Tensor
    position_ids: Tensor
    indices_in_segments: Tensor
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
    # In numpy, whose operations on arrays this small take a tenth of torch's time.
    slots = np.arange(capacity, dtype=np.int32)
    segment_ids = np.full((batch_size, capacity), PADDING, np.int32)
    position_ids = np.empty((batch_size, capacity), np.int32)
    indices = np.empty((batch_size, capacity), np.int32)
    for table in (position_ids, indices):
        table[len(layouts) :] = 0
    for row, (layout, count, start) in enumerate(zip(layouts, num_tokens, starts, strict=True)):
        stop = start + len(layout)
        if stop > capacity:
            raise LayoutError(f"row {row} needs {stop} slots, got {capacity}")
        segment_ids[row, start : start + count] = layout.segment_array[:count]
        for values, prompt, next_value in (
            (position_ids[row], layout.position_array, layout.next_position),
            (indices[row], layout.index_array, len(layout) - layout.tail_start),
        ):
            np.add(slots, next_value - stop, out=values)
            values[:start] = 0
            values[start:stop] = prompt
    has_choices = any(layout.choice_lengths for layout in layouts)
    choices = _without_choices((batch_size, capacity), CPU) if has_choices else None
    if choices is not None:
        for row, (layout, start) in enumerate(zip(layouts, starts, strict=True)):
            own = slice(start, start + len(layout))
            choices.choice_ids[row, own] = torch.from_numpy(layout.choice_array)
            choices.tail_slots[row, own] = torch.from_numpy(layout.tail_slot_array + start)
    return LayoutTables(
        torch.from_numpy(segment_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(indices),
        choices,
    )


def _without_choices(shape: Sequence[int], device: torch.device) -> ChoiceTables:
    batch_size, capacity = shape
    slots = torch.arange(capacity, dtype=torch.int32, device=device)
    return ChoiceTables(
        torch.zeros(batch_size, capacity, dtype=torch.int32, device=device),
        slots.repeat(batch_size, 1),
    )
