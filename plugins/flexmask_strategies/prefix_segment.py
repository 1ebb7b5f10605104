"""Segments share one prefix and do not see each other; the tail sees everything.

The prefix is stored and computed once. ``q`` down, ``kv`` across, prefix P, segments 1 and 2, tail
T, with the positions of ``positions=restart`` on top::

        0 1 2 3 2 3 4
        P P 1 1 2 2 T
      P #
      P # #
      1 # # #
      1 # # # #
      2 # #     #
      2 # #     # #
      T # # # # # # #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.layout import PREFIX, TAIL, Layout, Positions, TokenizedRequest, shared_prefix_layout
from flexmask.mask_mods import and_masks, causal, is_fusion_tail, is_prefix, or_masks, same_segment
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy, parameter

if TYPE_CHECKING:
    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class PrefixSegment(Strategy):
    """Each segment sees the shared prefix and itself; the tail sees everything."""

    name = "prefix_segment"
    positions: Positions = parameter(
        "restart", help="restart: every segment starts after the prefix; sequential: slot numbers."
    )

    def layout(self, request: TokenizedRequest) -> Layout:
        return shared_prefix_layout(request, self.positions)

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        visible = or_masks(same_segment(batch), is_prefix(batch), is_fusion_tail(batch))
        return and_masks(causal, visible)

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        q_segment, kv_segment = layout.segment_ids[q_idx], layout.segment_ids[kv_idx]
        return kv_idx <= q_idx and (q_segment == TAIL or kv_segment in (q_segment, PREFIX))


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [PrefixSegment]
