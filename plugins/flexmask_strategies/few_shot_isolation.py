"""Examples do not see each other, nor do paraphrases of the question, which see all examples.

A few-shot prompt whose examples come in several paraphrases, as in scripts around MyriadLAMA (Zhao
et al., 2024, arXiv:2406.12277). The first ``examples`` times ``paraphrases`` segments are
examples; the segments after them are paraphrases of the question, which see every example but not
each other. Without such segments, the question is in the tail. Examples start after the prefix,
paraphrases of the question after the longest example. ``examples=2``, ``q`` down, ``kv`` across,
prefix P, segments 1 to 4, tail T, positions on top::

        0 1 1 2 2 3
        P 1 2 3 4 T
      P #
      1 # #
      2 #   #
      3 # # # #
      4 # # #   #
      T # # # # # #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.errors import RequestError
from flexmask.layout import (
    PREFIX,
    TAIL,
    Layout,
    Positions,
    TokenizedRequest,
    consecutive_starts,
    placed_layout,
)
from flexmask.mask_mods import and_masks, causal, is_fusion_tail, is_prefix, or_masks, same_segment
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy, parameter

if TYPE_CHECKING:
    from torch import Tensor

    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class FewShotIsolation(Strategy):
    """Examples see only themselves, paraphrases of the question all examples too; the tail all."""

    name = "few_shot_isolation"
    examples: int = parameter(1, help="Number of few-shot examples; they come first.", minimum=0)
    paraphrases: int = parameter(1, help="Number of segments of each example.", minimum=1)
    positions: Positions = parameter(
        "restart",
        help="restart: examples start after the prefix, paraphrases of the question after the "
        "longest example; sequential: slot numbers.",
    )

    @property
    def num_example_segments(self) -> int:
        """Number of segments that hold examples; the others are paraphrases of the question."""
        return self.examples * self.paraphrases

    def layout(self, request: TokenizedRequest) -> Layout:
        count, segments = self.num_example_segments, request.segments
        if len(segments) < count:
            raise RequestError(
                f"examples={self.examples} times paraphrases={self.paraphrases} need {count} "
                f"segments, got {len(segments)}"
            )
        if self.positions == "sequential":
            return placed_layout(request, consecutive_starts(request))
        start = len(request.prefix)
        longest = max(map(len, segments[:count]), default=0)
        questions = [start + longest] * (len(segments) - count)
        return placed_layout(request, [start] * count + questions)

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        segment_ids, last_example = batch.segment_ids, self.num_example_segments

        def sees_examples(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            is_question = segment_ids[b, q_idx] > last_example
            return is_question & (segment_ids[b, kv_idx] <= last_example)

        visible = or_masks(
            same_segment(batch), is_prefix(batch), sees_examples, is_fusion_tail(batch)
        )
        return and_masks(causal, visible)

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        q_segment, kv_segment = layout.segment_ids[q_idx], layout.segment_ids[kv_idx]
        sees_example = kv_segment <= self.num_example_segments < q_segment
        sees_own = q_segment == TAIL or kv_segment in (q_segment, PREFIX)
        return kv_idx <= q_idx and (sees_own or sees_example)


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [FewShotIsolation]
