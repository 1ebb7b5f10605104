"""Documents do not see each other; what follows sees their first tokens computed in context.

LegoLink of EPIC (Hu et al., ICML 2025, arXiv:2410.15332). The first tokens of a document that was
computed alone draw attention as those of a prompt do. So the first ``link_tokens`` of each
document but the first are computed again and see everything before. For one pass, they are copies,
stored before the document at the same positions: what follows sees the copies instead of the
originals, which only their own document sees. So keys and values of whole documents can be reused.
Unlike the paper's, documents see the prefix. ``link_tokens=1``, ``q`` down, ``kv`` across, prefix
P, documents 1, 3 and 5, copies 2 and 4, tail T, positions on top::

        0 1 2 3 3 4 5 5 6 7
        P 1 1 2 3 3 4 5 5 T
      P #
      1 # #
      1 # # #
      2 # # # #
      3 #       #
      3 #       # #
      4 # # # #   # #
      5 #             #
      5 #             # #
      T # # # #   # #   # #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flexmask.layout import (
    PREFIX,
    TAIL,
    Layout,
    Positions,
    TokenizedRequest,
    consecutive_starts,
    placed_layout,
)
from flexmask.mask_mods import and_masks, causal, is_prefix, or_masks, same_segment
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy, parameter

if TYPE_CHECKING:
    from torch import Tensor

    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class BoundaryRepair(Strategy):
    """Each document sees the prefix and itself; its first tokens, computed again, see all before.

    Segment ids of the layout: documents are 1, 3, 5 and so on, copies of the first tokens of a
    document have the number before its own.
    """

    name = "boundary_repair"
    link_tokens: int = parameter(
        16, help="Number of first tokens of a document that are computed again.", minimum=1
    )
    positions: Positions = parameter(
        "sequential",
        help="sequential: documents follow each other; restart: all start after the prefix.",
    )

    def layout(self, request: TokenizedRequest) -> Layout:
        first, *others = request.segments
        starts = [len(request.prefix)] * len(request.segments)
        if self.positions == "sequential":
            starts = consecutive_starts(request)
        with_copies = [part for doc in others for part in (doc[: self.link_tokens], doc)]
        starts = starts[:1] + [start for start in starts[1:] for _ in range(2)]
        return placed_layout(replace(request, segments=(first, *with_copies)), starts)

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        segment_ids, indices = batch.segment_ids, batch.indices_in_segments
        link_tokens = self.link_tokens

        def sees_repaired(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            query, key = segment_ids[b, q_idx], segment_ids[b, kv_idx]
            is_repaired = (key > 1) & (key % 2 == 1) & (indices[b, kv_idx] < link_tokens)
            return ((query == TAIL) | (query % 2 == 0)) & ~is_repaired

        return and_masks(causal, or_masks(same_segment(batch), is_prefix(batch), sees_repaired))

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        q_segment, kv_segment = layout.segment_ids[q_idx], layout.segment_ids[kv_idx]
        if kv_idx > q_idx:
            return False
        if kv_segment in (q_segment, PREFIX):
            return True
        is_document = kv_segment > 1 and kv_segment % 2 == 1
        is_repaired = is_document and layout.indices_in_segments[kv_idx] < self.link_tokens
        return (q_segment == TAIL or q_segment % 2 == 0) and not is_repaired


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [BoundaryRepair]
