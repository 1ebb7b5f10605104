"""Every token sees the last ``stride`` tokens, and every ``stride``-th one before them.

The strided pattern of Sparse Transformers (Child et al., 2019, arXiv:1904.10509), with both of its
halves in one head. ``stride=3``, ``q`` down, ``kv`` across, prefix P, segments 1 and 2, tail T::

        P P 1 1 2 2 T
      P #
      P # #
      1 # # #
      1 # # # #
      2   # # # #
      2     # # # #
      T #     # # # #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.layout import Layout
from flexmask.mask_mods import and_masks, causal, multiples_apart, or_masks, within_window
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy, parameter

if TYPE_CHECKING:
    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class Strided(Strategy):
    """Every token sees the last stride tokens, and every stride-th one before them."""

    name = "strided"
    stride: int = parameter(
        128, help="Length of the window, and distance of the tokens before it.", minimum=1
    )

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        near = within_window(batch, self.stride)
        return and_masks(causal, or_masks(near, multiples_apart(batch, self.stride)))

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        back = q_idx - kv_idx
        return back >= 0 and (back < self.stride or back % self.stride == 0)


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [Strided]
