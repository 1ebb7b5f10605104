"""A strategy bound to the buffers of one batch size: its masks and changes of scores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmask.attention.backend import CausalRows
from flexmask.attention.placement import (
    FlatTilePlacement,
    RowPlacement,
    TilePlacement,
    placed_mask,
    placed_score,
)
from flexmask.attention.scaled_part import place_part
from flexmask.block_mask import DecodeRowMask
from flexmask.block_mask.decode_row import check_row_mask
from flexmask.engine.prefill_plan import DecodeKernel, PrefillPlan
from flexmask.engine.row_loading import to_device
from flexmask.kernels.decode_attention import KeyTable
from flexmask.layout_batch import ChoiceTables, LayoutBatch, LayoutTables
from flexmask.mask_mods import layer_masks
from flexmask.strategy import Strategy


class BoundStrategy:
    """A strategy bound to buffers for ``batch_size`` rows of ``capacity`` slots.

    `ModelRunner.prepare` makes it. The buffers stay in place while their content changes from
    prompt to prompt, so what captured them is not compiled again. Masks are kept by the kind of
    layer, because some layers have a sliding window too.

    Attributes:
        strategy: The mask strategy.
        batch_size: Batch rows.
        capacity: Slots per row.
        batch: Segment ids and positions.
        slots: ``(B,)`` slot of the token that each row decodes next.
        tile_rows: ``(N,)`` batch row of each tile of queries of a prefill.
        tile_slots: ``(N, Q)`` slots of these queries.
        query_masks: Masks of the queries of a prefill over the slots of all rows, by kind of
            layer; each tile is a batch entry.
        flat_masks: The same, for all tiles as one batch entry.
        query_score_mod: Changes the scores of these queries; None for no change.
        query_part: The scaled part of the keys for these queries (`ScaledPart`), or None.
        decode_score_mod: As `query_score_mod`, for the token that is decoded next.
        decode_part: As `query_part`, for the token that is decoded next.
        key_table: Slots from which decoding reads the keys of each row; None if it reads all.
    """

    def __init__(
        self,
        strategy: Strategy,
        batch_size: int,
        capacity: int,
        device: torch.device,
        windows: Mapping[str, int | None],
        tiles: tuple[int, int],
        *,
        with_key_table: bool,
    ) -> None:
        """Allocate the buffers.

        Args:
            strategy: The mask strategy.
            batch_size: Batch rows.
            capacity: Slots per row.
            device: Device of the buffers.
            windows: Sliding window of each kind of layer, in tokens; None for no window.
            tiles: Most tiles of queries of a prefill, and queries of a tile.
            with_key_table: Let decoding read keys through a table.
        """
        self.strategy = strategy
        self.batch_size = batch_size
        self.capacity = capacity
        self.batch = LayoutBatch(batch_size, capacity, device)
        self.slots = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.tile_rows = torch.zeros(tiles[0], dtype=torch.int32, device=device)
        self.tile_slots = torch.zeros(tiles, dtype=torch.int32, device=device)
        self.key_table: KeyTable | None = None
        if with_key_table:
            key_slots = torch.zeros_like(self.batch.position_ids)
            sharing = torch.zeros(batch_size, 3, dtype=torch.int32, device=device)
            self.key_table = KeyTable(key_slots, sharing)
        self._tiles = TilePlacement(self.tile_rows, self.tile_slots, capacity)
        self._mask_mods = layer_masks(strategy, self.batch, windows)
        flat = FlatTilePlacement(self.tile_rows, self.tile_slots, capacity)
        self.query_masks, self.flat_masks = (
            {kind: placed_mask(mask_mod, at) for kind, mask_mod in self._mask_mods.items()}
            for at in (self._tiles, flat)
        )
        for mask_mod in self._mask_mods.values():
            check_row_mask(mask_mod, batch_size, capacity, device)
        self._decode_masks: dict[str, DecodeRowMask] = {}
        none = torch.zeros(batch_size, 1, 1, 1, dtype=torch.int32, device=device)
        self._causal_rows = CausalRows.from_kv_blocks(
            none[..., 0], none, seq_lengths=(1, capacity), compute_q_blocks=False
        )
        self._bind_scores()

    def _bind_scores(self) -> None:
        score_mod = self.strategy.applied_score_mod(self.batch)
        part = self.strategy.scaled_part(self.batch)
        one_of_each_row = RowPlacement(self.slots[:, None])
        self.query_part = place_part(part, self._tiles)
        self.decode_part = place_part(part, one_of_each_row)
        self.query_score_mod = placed_score(score_mod, self._tiles)
        self.decode_score_mod = placed_score(score_mod, one_of_each_row)

    def load(self, plan: PrefillPlan, rows: Tensor) -> None:
        """Load the prompts of a plan; other rows stay as they are.

        Args:
            plan: The plan.
            rows: Its batch rows on the device.
        """
        device = rows.device
        choices = plan.tables.choices
        tables = LayoutTables(
            to_device(plan.tables.segment_ids, device),
            to_device(plan.tables.position_ids, device),
            to_device(plan.tables.indices_in_segments, device),
            choices and ChoiceTables(*(to_device(table, device) for table in choices)),
        )
        self.batch.load_rows(rows, tables)
        self.slots.index_copy_(0, rows, to_device(torch.tensor(plan.counts), device))
        if self.key_table is not None and plan.key_table is not None:
            for buffer, content in zip(self.key_table, plan.key_table, strict=True):
                buffer.index_copy_(0, rows, to_device(content, device))

    def make_decode_masks(self, kernels: Mapping[str, DecodeKernel]) -> None:
        """Make the masks that decoding reads; on CUDA each of them compiles."""
        for kind, kernel in kernels.items():
            if kernel == "flex_attention" and kind not in self._decode_masks:
                self._decode_masks[kind] = DecodeRowMask(
                    self._mask_mods[kind], self.batch_size, self.capacity, self.slots.device
                )

    def decode_masks(self, kernels: Mapping[str, DecodeKernel]) -> dict[str, BlockMask]:
        """Update and return the masks of the tokens at `slots`, for the kernels chosen."""
        masks: dict[str, BlockMask] = {}
        for kind, kernel in kernels.items():
            if kernel == "decode_attention":
                masks[kind] = self._causal_rows
            else:
                self._decode_masks[kind].update(self.slots)
                masks[kind] = self._decode_masks[kind].block_mask
        return masks
