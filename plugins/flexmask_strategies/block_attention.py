"""Prefix and segments are blocks that see only themselves; the tail sees all.

Block-Attention (Ma et al., ICLR 2025, arXiv:2409.15355). The paper computes the keys of a block
once, at positions from 0 on, and re-encodes them to the block's positions in a prompt. Because
rotary embeddings are relative, isolated blocks at consecutive positions give the same result.
Needs weights fine-tuned with this mask. ``q`` down, ``kv`` across, prefix P, segments 1 and 2,
tail T, positions on top::

        0 1 2 3 4 5 6
        P P 1 1 2 2 T
      P #
      P # #
      1     #
      1     # #
      2         #
      2         # #
      T # # # # # # #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.layout import TAIL, Layout
from flexmask.mask_mods import and_masks, causal, is_fusion_tail, or_masks, same_segment
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class BlockAttention(Strategy):
    """The prefix and each segment see only themselves; the tail sees everything."""

    name = "block_attention"

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        return and_masks(causal, or_masks(same_segment(batch), is_fusion_tail(batch)))

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        q_segment, kv_segment = layout.segment_ids[q_idx], layout.segment_ids[kv_idx]
        return kv_idx <= q_idx and q_segment in (kv_segment, TAIL)


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [BlockAttention]
