"""Every token sees a window that ends with it and, optionally, the first tokens (sinks).

The sliding window is Mistral 7B's (Jiang et al., 2023, arXiv:2310.06825); sinks are those of
StreamingLLM (Xiao et al., ICLR 2024, arXiv:2309.17453), which also numbers positions within its
cache; here tokens keep their positions in the text. ``window=3``, ``sinks=1``, ``q`` down, ``kv``
across, prefix P, segments 1 and 2, tail T::

        P P 1 1 2 2 T
      P #
      P # #
      1 # # #
      1 # # # #
      2 #   # # #
      2 #     # # #
      T #       # # #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.layout import Layout
from flexmask.mask_mods import and_masks, causal, or_masks, within_window
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy, parameter

if TYPE_CHECKING:
    from torch import Tensor

    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class SlidingWindow(Strategy):
    """Every token sees the window that ends with it, and optionally the first tokens (sinks)."""

    name = "sliding_window"
    window: int = parameter(4096, help="Tokens that a token sees, including itself.", minimum=1)
    sinks: int = parameter(0, help="Number of first tokens that all tokens see.", minimum=0)

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        position_ids, sinks = batch.position_ids, self.sinks

        def is_sink(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return position_ids[b, kv_idx] < sinks

        return and_masks(causal, or_masks(within_window(batch, self.window), is_sink))

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        return kv_idx <= q_idx and (q_idx - kv_idx < self.window or kv_idx < self.sinks)


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [SlidingWindow]
