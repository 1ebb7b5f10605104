"""A strategy over the buffers of batches of one size: its masks and its changes of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch._dynamo import mark_static
from torch.nn.attention.flex_attention import BlockMask

from flexmask.attention.backend import CausalRows
from flexmask.attention.scaled_part import place_part
from flexmask.block_mask import DecodeRowMask
from flexmask.block_mask.decode_row import check_row_mask
from flexmask.block_mask.equality import rows_are_causal, runs_are_causal
from flexmask.engine.prefill_plan import PrefillPlan
from flexmask.engine.slot_mods import mask_at_slots, score_at_slots, score_from_slots
from flexmask.kernels.decode_attention import KeyTable
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import and_masks, strategy_mask, within_window
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.mod_types import MaskMod, ScoreMod

DecodeKernel = Literal["flex_attention", "decode_attention"]


class PlacedStrategy:
    """What one strategy needs for ``batch_size`` rows of ``capacity`` slots.

    Masks are kept by the kind of layer, because some layers have a sliding window besides.

    Attributes:
        strategy: Who sees whom.
        batch_size: Rows.
        capacity: Slots of each.
        batch: Segment ids and positions.
        slots: ``(B,)`` slot of the token that each row decodes next.
        query_slots: ``(B, capacity)`` slots of the queries of a prefill (`PrefillPlan`).
        query_masks: Masks of these.
        query_score_mod: Changes their scores.
        query_part: Keys that they weigh otherwise.
        decode_score_mod: As `query_score_mod`, for the token that is decoded next.
        decode_part: As `query_part`, for that token.
        key_table: Where decoding finds the keys of each row; None if it reads all slots.
        changes_scores: Whether there is any of these four.
    """

    def __init__(
        self,
        strategy: Strategy,
        batch_size: int,
        capacity: int,
        device: torch.device,
        windows: Mapping[str, int | None],
        *,
        with_key_table: bool,
    ) -> None:
        """Allocate the buffers.

        Args:
            strategy: Who sees whom.
            batch_size: Rows.
            capacity: Slots of each.
            device: Where they are.
            windows: Sliding window of each kind of layer; None for none.
            with_key_table: Whether decoding reads keys through a table.
        """
        self.strategy = strategy
        self.batch_size = batch_size
        self.capacity = capacity
        self.batch = LayoutBatch(batch_size, capacity, device)
        self.slots = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.query_slots = torch.zeros_like(self.batch.position_ids)
        mark_static(self.query_slots)
        self.key_table: KeyTable | None = None
        if with_key_table:
            sharing = torch.zeros(batch_size, 3, dtype=torch.int32, device=device)
            self.key_table = KeyTable(torch.zeros_like(self.query_slots), sharing)
        self._windows = windows
        allowed = strategy_mask(strategy, self.batch)
        self._mask_mods: dict[str, MaskMod] = {
            kind: allowed
            if window is None
            else and_masks(allowed, within_window(self.batch, window))
            for kind, window in windows.items()
        }
        self.query_masks = {
            kind: mask_at_slots(mask_mod, self.query_slots)
            for kind, mask_mod in self._mask_mods.items()
        }
        for mask_mod in self._mask_mods.values():
            check_row_mask(mask_mod, batch_size, capacity, device)
        self._decode_masks: dict[str, DecodeRowMask] = {}
        none = torch.zeros(batch_size, 1, 1, 1, dtype=torch.int32, device=device)
        self._causal_rows = CausalRows.from_kv_blocks(
            none[..., 0], none, seq_lengths=(1, capacity), compute_q_blocks=False
        )
        self._place_scores()

    def _place_scores(self) -> None:
        score_mod = self.strategy.score_mod(self.batch)
        part = self.strategy.scaled_part(self.batch)
        self.changes_scores = score_mod is not None or part is not None
        self.query_part = place_part(part, self.query_slots)
        self.decode_part = place_part(part, self.slots[:, None])
        self.query_score_mod: ScoreMod | None = None
        self.decode_score_mod: ScoreMod | None = None
        if score_mod is not None:
            mark_static(self.slots)
            self.query_score_mod = score_at_slots(score_mod, self.query_slots)
            self.decode_score_mod = score_from_slots(score_mod, self.slots)

    def load(self, plan: PrefillPlan) -> None:
        """Place the tokens that a prefill computes or copies."""
        self.batch.copy_from(plan.tables)
        rows, count = plan.query_slots.shape
        self.query_slots[:rows, :count] = plan.query_slots.to(self.query_slots.device)
        if self.key_table is not None and plan.key_table is not None:
            for buffer, content in zip(self.key_table, plan.key_table, strict=True):
                buffer.copy_(content)

    def decode_kernels(self) -> dict[str, DecodeKernel]:
        """Which kernel attends from `slots` on, by kind of layer.

        It is the one for causal rows where they provably are, with the tail open. One
        synchronisation with the device for each kind.
        """
        kernels: dict[str, DecodeKernel] = dict.fromkeys(self._mask_mods, "flex_attention")
        if not self.changes_scores:
            self.batch.open_tail(self.slots)
            for kind, mask_mod in self._mask_mods.items():
                if rows_are_causal(mask_mod, self.slots, self.capacity):
                    kernels[kind] = "decode_attention"
            self.batch.close_tail(self.slots)
        self._make_decode_masks(kernels)
        return kernels

    def _make_decode_masks(self, kernels: Mapping[str, DecodeKernel]) -> None:
        # Only those that are read: on CUDA each compiles.
        for kind, kernel in kernels.items():
            if kernel == "flex_attention" and kind not in self._decode_masks:
                self._decode_masks[kind] = DecodeRowMask(
                    self._mask_mods[kind], self.batch_size, self.capacity, self.slots.device
                )

    def decode_masks(self, kernels: Mapping[str, DecodeKernel]) -> dict[str, BlockMask]:
        """Masks of the tokens at `slots`, for the kernels chosen."""
        masks: dict[str, BlockMask] = {}
        for kind, kernel in kernels.items():
            if kernel == "decode_attention":
                masks[kind] = self._causal_rows
            else:
                self._decode_masks[kind].update(self.slots)
                masks[kind] = self._decode_masks[kind].block_mask
        return masks

    def see_only_themselves(
        self, starts: Sequence[Sequence[int]], length: int, kv_length: int
    ) -> bool:
        """Whether runs of ``length`` slots provably see themselves causally, and nothing else.

        Args:
            starts: First slots of the runs in each row.
            length: Slots of a run.
            kv_length: Slots that are asked about.
        """
        rows, firsts = runs_of(starts, self.slots.device)
        return all(
            runs_are_causal(mask_mod, rows, firsts, length, kv_length, self._windows[kind])
            for kind, mask_mod in self._mask_mods.items()
        )


def runs_of(starts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and first slot of each run, ``(R,)`` each, from the first slots in each row."""
    runs = [(row, start) for row, own in enumerate(starts) for start in own]
    rows, firsts = torch.tensor(runs, device=device).unbind(1)
    return rows, firsts
