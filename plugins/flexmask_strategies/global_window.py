"""Every token sees a window and the prefix; the tail sees everything.

Longformer's sliding window with global attention (Beltagy et al., 2020, arXiv:2004.05150), made
causal: the global tokens are the prefix, which all tokens see, and the tail, which sees all.
``window=2``, ``q`` down, ``kv`` across, prefix P, segments 1 and 2, tail T::

        P P 1 1 2 2 T
      P #
      P # #
      1 # # #
      1 # # # #
      2 # #   # #
      2 # #     # #
      T # # # # # # #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.layout import PREFIX, TAIL, Layout
from flexmask.mask_mods import (
    and_masks,
    causal,
    is_fusion_tail,
    is_prefix,
    or_masks,
    within_window,
)
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy, parameter

if TYPE_CHECKING:
    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class GlobalWindow(Strategy):
    """Every token sees a window and the prefix; the tail sees everything."""

    name = "global_window"
    window: int = parameter(512, help="Tokens in the window, including the token.", minimum=1)

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        near = within_window(batch, self.window)
        return and_masks(causal, or_masks(near, is_prefix(batch), is_fusion_tail(batch)))

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        is_global = layout.segment_ids[q_idx] == TAIL or layout.segment_ids[kv_idx] == PREFIX
        return kv_idx <= q_idx and (q_idx - kv_idx < self.window or is_global)


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [GlobalWindow]
