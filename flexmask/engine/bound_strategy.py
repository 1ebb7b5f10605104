"""A strategy bound to the buffers of one batch size: its masks and changes of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmask.attention.backend import CausalRows
from flexmask.attention.scaled_part import place_part
from flexmask.block_mask import DecodeRowMask
from flexmask.block_mask.decode_row import check_row_mask
from flexmask.block_mask.equality import rows_are_causal, spans_are_causal
from flexmask.engine.prefill_plan import PrefillPlan
from flexmask.kernels.decode_attention import KeyTable
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import and_masks, strategy_mask, within_window
from flexmask.strategy import Strategy
from flexmask.torch_internals import mark_static

if TYPE_CHECKING:
    from flexmask.mod_types import MaskMod, ScoreMod

DecodeKernel = Literal["flex_attention", "decode_attention"]


class BoundStrategy:
    """A strategy bound to buffers for ``batch_size`` rows of ``capacity`` slots.

    `ModelRunner.prepare` makes it. The buffers stay in place while their content changes from
    batch to batch, so what captured them is not compiled again. Masks are kept by the kind of
    layer, because some layers have a sliding window too.

    Attributes:
        strategy: The mask strategy.
        batch_size: Batch rows.
        capacity: Slots per row.
        batch: Segment ids and positions.
        slots: ``(B,)`` slot of the token that each row decodes next.
        query_slots: ``(B, capacity)`` slots of the queries of a prefill (`PrefillPlan`).
        query_masks: Masks of the queries of a prefill, by kind of layer.
        query_score_mod: Changes the scores of these queries; None for no change.
        query_part: The scaled part of the keys for these queries (`ScaledPart`), or None.
        decode_score_mod: As `query_score_mod`, for the token that is decoded next.
        decode_part: As `query_part`, for the token that is decoded next.
        key_table: Slots from which decoding reads the keys of each row; None if it reads all.
        changes_scores: True if the strategy has a score_mod or a scaled part.
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
            strategy: The mask strategy.
            batch_size: Batch rows.
            capacity: Slots per row.
            device: Device of the buffers.
            windows: Sliding window of each kind of layer, in tokens; None for no window.
            with_key_table: Let decoding read keys through a table.
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
            kind: _mask_at_slots(mask_mod, self.query_slots)
            for kind, mask_mod in self._mask_mods.items()
        }
        for mask_mod in self._mask_mods.values():
            check_row_mask(mask_mod, batch_size, capacity, device)
        self._decode_masks: dict[str, DecodeRowMask] = {}
        none = torch.zeros(batch_size, 1, 1, 1, dtype=torch.int32, device=device)
        self._causal_rows = CausalRows.from_kv_blocks(
            none[..., 0], none, seq_lengths=(1, capacity), compute_q_blocks=False
        )
        self._bind_scores()

    def _bind_scores(self) -> None:
        score_mod = self.strategy.score_mod(self.batch)
        part = self.strategy.scaled_part(self.batch)
        self.changes_scores = score_mod is not None or part is not None
        self.query_part = place_part(part, self.query_slots)
        self.decode_part = place_part(part, self.slots[:, None])
        self.query_score_mod: ScoreMod | None = None
        self.decode_score_mod: ScoreMod | None = None
        if score_mod is not None:
            mark_static(self.slots)
            self.query_score_mod = _score_at_slots(score_mod, self.query_slots)
            self.decode_score_mod = _score_from_slots(score_mod, self.slots)

    def load(self, plan: PrefillPlan) -> None:
        """Load the layouts of a batch, and the slots of the queries of its prefill."""
        self.batch.copy_from(plan.tables)
        rows, count = plan.query_slots.shape
        self.query_slots[:rows, :count] = plan.query_slots.to(self.query_slots.device)
        if self.key_table is not None and plan.key_table is not None:
            for buffer, content in zip(self.key_table, plan.key_table, strict=True):
                buffer.copy_(content)

    def decode_kernels(self) -> dict[str, DecodeKernel]:
        """Choose the kernel that decodes from `slots` on, by kind of layer.

        ``decode_attention`` serves rows that see every slot before them. It is chosen where the
        mask is proved to be causal for the slots of the fusion tail. Synchronises with the device
        once for each kind.
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
        # Only the masks that are read, because on CUDA each of them compiles.
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

    def see_only_themselves(
        self, starts: Sequence[Sequence[int]], length: int, kv_length: int
    ) -> bool:
        """Return whether spans of slots are proved to see themselves, causally, and nothing else.

        Args:
            starts: First slots of the spans in each row.
            length: Slots of a span.
            kv_length: Slots over which the masks are compared.
        """
        rows, firsts = spans_of(starts, self.slots.device)
        return all(
            spans_are_causal(mask_mod, rows, firsts, length, kv_length, self._windows[kind])
            for kind, mask_mod in self._mask_mods.items()
        )


def spans_of(starts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and first slot of each span, ``(N,)`` each, from the first slots in each row."""
    spans = [(row, start) for row, own in enumerate(starts) for start in own]
    rows, firsts = torch.tensor(spans, device=device).unbind(1)
    return rows, firsts


def _mask_at_slots(mask_mod: MaskMod, slots: Tensor) -> MaskMod:
    """The mask of queries at ``slots`` ``(B, Q)`` of their rows."""

    def at_slots(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, slots[b, q_idx], kv_idx)

    return at_slots


def _score_at_slots(score_mod: ScoreMod, slots: Tensor) -> ScoreMod:
    """The change of scores of queries at ``slots`` ``(B, Q)`` of their rows."""

    def at_slots(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h, slots[b, q_idx], kv_idx)

    return at_slots


def _score_from_slots(score_mod: ScoreMod, first_slots: Tensor) -> ScoreMod:
    """The change of scores of queries that begin at ``first_slots`` ``(B,)`` of their rows."""

    def from_slots(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h, first_slots[b] + q_idx, kv_idx)

    return from_slots
