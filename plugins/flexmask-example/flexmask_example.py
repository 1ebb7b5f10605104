"""Segments see the few before them: between ``prefix_segment`` (none) and ``causal`` (all).

Suits segments in order, such as the turns of a conversation or the chunks of a long document.
``q`` down, ``kv`` across, prefix P, segments 1 to 3, tail T, with ``reach=1``::

        P 1 1 2 2 3 3 T
      P #
      1 # #
      1 # # #
      2 # # # #
      2 # # # # #
      3 #     # # #
      3 #     # # # #
      T # # # # # # # #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask import Layout, Strategy, hookimpl, parameter
from flexmask.errors import StrategyError
from flexmask.layout import PREFIX, TAIL
from flexmask.mask_mods import and_masks, causal, is_fusion_tail, is_prefix, or_masks

if TYPE_CHECKING:
    from torch import Tensor

    from flexmask.layout_batch import LayoutBatch
    from flexmask.strategy import MaskMod


@dataclass(frozen=True)
class RecentSegments(Strategy):
    """Each segment sees the prefix, itself and the few before it; the tail sees everything."""

    name = "recent_segments"
    reach: int = parameter(1, help="How many segments before its own a token sees.")

    def __post_init__(self) -> None:
        """Refuse what the type alone does not."""
        if self.reach < 0:
            raise StrategyError(f"reach must not be negative, got {self.reach}")

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        segment_ids, reach = batch.segment_ids, self.reach

        def is_within_reach(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return segment_ids[b, q_idx] - segment_ids[b, kv_idx] <= reach

        visible = or_masks(is_within_reach, is_prefix(batch), is_fusion_tail(batch))
        return and_masks(causal, visible)

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        q_segment, kv_segment = layout.segment_ids[q_idx], layout.segment_ids[kv_idx]
        is_within_reach = q_segment - kv_segment <= self.reach
        return kv_idx <= q_idx and (is_within_reach or kv_segment == PREFIX or q_segment == TAIL)


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [RecentSegments]
