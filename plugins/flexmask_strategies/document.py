"""Independent documents packed into one row; the tail continues the last of them.

Sequence packing with a document mask and restarted positions (Krell et al., 2021,
arXiv:2107.02027). Each document starts with its own copy of the prefix, including the
beginning-of-sequence token. Nothing is fused: generation continues the last document alone. ``q``
down, ``kv`` across, documents 1 and 2 with a prefix of one token, tail T, positions on top::

        0 1 2 0 1 2 3
        1 1 1 2 2 2 T
      1 #
      1 # #
      1 # # #
      2       #
      2       # #
      2       # # #
      T       # # # #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.layout import TAIL, Layout, TokenizedRequest, placed_layout
from flexmask.mask_mods import and_masks, causal, is_fusion_tail, or_masks, same_segment
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class Document(Strategy):
    """Each document sees only itself, from position 0; the tail continues the last one."""

    name = "document"

    def layout(self, request: TokenizedRequest) -> Layout:
        documents = request.with_copied_prefix()
        starts = [0] * len(documents.segments)
        return placed_layout(documents, starts, tail_start=len(documents.segments[-1]))

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        position_ids = batch.position_ids

        # Slot minus position is the same for a document's tokens and the tail that continues it.
        def same_start(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return q_idx - position_ids[b, q_idx] == kv_idx - position_ids[b, kv_idx]

        continues = and_masks(is_fusion_tail(batch), same_start)
        return and_masks(causal, or_masks(same_segment(batch), continues))

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        q_document, kv_document = layout.segment_ids[q_idx], layout.segment_ids[kv_idx]
        continues_last = q_document == TAIL and kv_document == layout.num_segments
        return kv_idx <= q_idx and (q_document == kv_document or continues_last)


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [Document]
