"""Windows of context do not see each other and reuse the same positions; the tail sees all.

Parallel Context Windows (Ratner et al., ACL 2023, arXiv:2212.10947). A window holds one segment,
or with ``n_windows`` several consecutive ones, which see the ones before them. The prefix (in the
paper the beginning-of-sequence token) is stored once; the tail holds the task tokens, which
continue after the longest window. ``q`` down, ``kv`` across, prefix P, windows 1 and 2, tail T,
positions on top::

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
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from flexmask.errors import RequestError
from flexmask.layout import PREFIX, TAIL, Layout, TokenizedRequest, shared_prefix_layout
from flexmask.mask_mods import and_masks, causal, is_fusion_tail, is_prefix, or_masks, same_segment
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy, parameter

if TYPE_CHECKING:
    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod

    Segments = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ParallelContext(Strategy):
    """Each window sees the prefix and itself, at the same positions; the tail sees everything."""

    name = "parallel_context"
    n_windows: int = parameter(
        0, help="Number of windows that share the segments, in order; 0: one each.", minimum=0
    )

    def layout(self, request: TokenizedRequest) -> Layout:
        windows = tuple(sum(segments, ()) for segments in self._windows(request))
        return shared_prefix_layout(replace(request, segments=windows), "restart")

    def _windows(self, request: TokenizedRequest) -> list[Segments]:
        """Divide the segments among the windows; their numbers differ by one at most."""
        segments = request.segments
        count = self.n_windows or len(segments)
        if count > len(segments):
            raise RequestError(
                f"n_windows={count} needs at least as many segments, got {len(segments)}"
            )
        bounds = [number * len(segments) // count for number in range(count + 1)]
        return [segments[start:stop] for start, stop in pairwise(bounds)]

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        visible = or_masks(same_segment(batch), is_prefix(batch), is_fusion_tail(batch))
        return and_masks(causal, visible)

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        q_window, kv_window = layout.segment_ids[q_idx], layout.segment_ids[kv_idx]
        return kv_idx <= q_idx and (q_window == TAIL or kv_window in (q_window, PREFIX))


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [ParallelContext]
