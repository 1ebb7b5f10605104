"""Segments see the few before them: between ``prefix_segment`` (none) and ``causal`` (all).

Suits ordered segments, such as the turns of a conversation or the chunks of a long document.
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

from typing import TYPE_CHECKING

from flexmask import Strategy, hookimpl, mask_strategy, parameter
from flexmask.mask_mods import and_masks, causal, is_fusion_tail, is_prefix, or_masks

if TYPE_CHECKING:  # torch stays out of listings, which load plugins too
    from torch import Tensor

    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@mask_strategy
def recent_segments(
    batch: LayoutBatch,
    *,
    reach: int = parameter(
        1, help="Number of segments before its own that a token sees.", minimum=0
    ),
) -> MaskMod:
    """Each segment sees the prefix, itself and the few before it; the tail sees everything."""
    segment_ids = batch.segment_ids

    def is_within_reach(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return segment_ids[b, q_idx] - segment_ids[b, kv_idx] <= reach

    return and_masks(causal, or_masks(is_within_reach, is_prefix(batch), is_fusion_tail(batch)))


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [recent_segments]
