"""Segments are the nodes of a tree; each sees the prefix, its ancestors and itself.

Tree attention, as Medusa (Cai et al., ICML 2024, arXiv:2401.10774) and SpecInfer (Miao et al.,
ASPLOS 2024, arXiv:2305.09781) verify many candidates in one pass. ``parents`` is the tree: the
parent of each segment in order, 0 for the prefix. Positions continue those of the parent, so that
each path reads as one text; the tail sees all paths and continues after the longest.
``parents=0,0,1,1``, ``q`` down, ``kv`` across, prefix P, segments 1 to 4, tail T, positions on
top::

        0 1 1 2 2 3
        P 1 2 3 4 T
      P #
      1 # #
      2 #   #
      3 # #   #
      4 # #     #
      T # # # # # #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.errors import RequestError, StrategyError
from flexmask.layout import PADDING, TAIL, Layout, TokenizedRequest, placed_layout
from flexmask.mask_mods import and_masks, causal, is_fusion_tail, or_masks
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy, parameter

if TYPE_CHECKING:
    from torch import Tensor

    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class Tree(Strategy):
    """Each segment sees the prefix, its ancestors in a tree and itself; the tail sees all."""

    name = "tree"
    parents: str = parameter(
        "0,0,1,1,2,2",
        help="Parent of each segment in order, 0 for the prefix; a request may have fewer.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._parents()

    def _parents(self) -> list[int]:
        """Parse the parent of each segment."""
        try:
            parents = [int(number) for number in self.parents.split(",")]
        except ValueError:
            parents = [-1]
        if not all(0 <= parent <= before for before, parent in enumerate(parents)):
            raise StrategyError(
                "parents must name for each segment an earlier one, or 0 for the prefix, as in "
                f"0,0,1,1; got {self.parents!r}"
            )
        return parents

    def layout(self, request: TokenizedRequest) -> Layout:
        segments, parents = request.segments, self._parents()
        if len(segments) > len(parents):
            raise RequestError(
                f"parents={self.parents} names the parents of {len(parents)} segments, got "
                f"{len(segments)}; name the parent of each"
            )
        ends = [len(request.prefix)]
        for segment, parent in zip(segments, parents, strict=False):
            ends.append(ends[parent] + len(segment))
        starts = [ends[parent] for parent in parents[: len(segments)]]
        return placed_layout(request, starts)

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        segment_ids, on_path = batch.segment_ids, batch.table(self._paths())

        def is_on_path(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return on_path[segment_ids[b, q_idx] - PADDING, segment_ids[b, kv_idx] - PADDING]

        return and_masks(causal, or_masks(is_on_path, is_fusion_tail(batch)))

    def _paths(self) -> list[list[bool]]:
        """Return a table of whether the path to one node contains another.

        Its indices are segment ids from `PADDING` on; ids of the prefix, the tail and padding
        stand for the root.
        """
        paths: list[set[int]] = [{0}]
        for number, parent in enumerate(self._parents(), start=1):
            paths.append(paths[parent] | {number})
        nodes = [max(segment_id, 0) for segment_id in range(PADDING, len(paths))]
        return [[kv in paths[q] for kv in nodes] for q in nodes]

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        q_segment, kv_segment = layout.segment_ids[q_idx], layout.segment_ids[kv_idx]
        while q_segment > 0 and q_segment != kv_segment:
            q_segment = self._parents()[q_segment - 1]
        return kv_idx <= q_idx and q_segment in (kv_segment, TAIL)


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [Tree]
