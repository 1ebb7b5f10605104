"""Every token sees a window with gaps: itself and every ``dilation``-th token before it.

The dilated sliding window of Longformer (Beltagy et al., 2020, arXiv:2004.05150), as in its
autoregressive models: ``window`` tokens, ``dilation`` apart. ``window=3``, ``dilation=2``, ``q``
down, ``kv`` across, prefix P, segments 1 and 2, tail T::

        P P 1 1 2 2 T
      P #
      P   #
      1 #   #
      1   #   #
      2 #   #   #
      2   #   #   #
      T     #   #   #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.layout import Layout
from flexmask.mask_mods import and_masks, causal, multiples_apart, within_window
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy, parameter

if TYPE_CHECKING:
    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class Dilated(Strategy):
    """Every token sees itself and every dilation-th token before it, up to window tokens."""

    name = "dilated"
    window: int = parameter(512, help="Tokens that a token sees, including itself.", minimum=1)
    dilation: int = parameter(2, help="Distance between them; 1 leaves no gaps.", minimum=1)

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        reach = within_window(batch, self.window * self.dilation)
        return and_masks(causal, reach, multiples_apart(batch, self.dilation))

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        return q_idx - kv_idx in range(0, self.window * self.dilation, self.dilation)


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [Dilated]
