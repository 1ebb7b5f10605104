"""Each segment runs as if it were alone, with its own copy of the prefix; the tail fuses them.

``q`` down, ``kv`` across, segments 1 and 2 (each starts with a copy of the prefix), tail T, with
the positions of ``positions=restart`` on top::

        0 1 2 0 1 2 3
        1 1 1 2 2 2 T
      1 #
      1 # #
      1 # # #
      2       #
      2       # #
      2       # # #
      T # # # # # # #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.layout import TAIL, Layout, Positions, TokenizedRequest, copied_prefix_layout
from flexmask.mask_mods import and_masks, causal, is_fusion_tail, or_masks, same_segment
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy, parameter

if TYPE_CHECKING:
    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class EnsembleIsolation(Strategy):
    """Each segment sees its own copy of the prefix and itself; the tail sees everything."""

    name = "ensemble_isolation"
    positions: Positions = parameter(
        "restart", help="restart: every segment starts at 0; sequential: slot numbers."
    )

    def layout(self, request: TokenizedRequest) -> Layout:
        return copied_prefix_layout(request, self.positions)

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        return and_masks(causal, or_masks(same_segment(batch), is_fusion_tail(batch)))

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        q_segment, kv_segment = layout.segment_ids[q_idx], layout.segment_ids[kv_idx]
        return kv_idx <= q_idx and q_segment in (kv_segment, TAIL)


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [EnsembleIsolation]
