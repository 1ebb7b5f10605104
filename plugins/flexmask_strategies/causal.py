"""Plain causal attention over prefix, segments and tail, one after another.

The baseline: the segments are simply concatenated. ``q`` down, ``kv`` across, prefix P, segments 1
and 2, tail T::

        P P 1 1 2 2 T
      P #
      P # #
      1 # # #
      1 # # # #
      2 # # # # #
      2 # # # # # #
      T # # # # # # #
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.layout import Layout
from flexmask.mask_mods import causal
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class Causal(Strategy):
    """Every token sees everything before it; positions are consecutive."""

    name = "causal"

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        return causal

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        return kv_idx <= q_idx


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [Causal]
