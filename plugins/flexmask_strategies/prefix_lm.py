"""Tokens of the prefix see the whole prefix; all after it is causal.

The prefix LM of T5 (Raffel et al., JMLR 2020, arXiv:1910.10683); T5's input is the request's
prefix. ``q`` down, ``kv`` across, prefix P, segments 1 and 2, tail T::

        P P 1 1 2 2 T
      P # #
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

from flexmask.layout import PREFIX, Layout
from flexmask.mask_mods import and_masks, causal, is_prefix, or_masks, same_segment
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod


@dataclass(frozen=True)
class PrefixLM(Strategy):
    """The prefix sees itself in both directions; segments and tail see everything before."""

    name = "prefix_lm"
    is_causal = False

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        return or_masks(causal, and_masks(is_prefix(batch), same_segment(batch)))

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        both = {layout.segment_ids[q_idx], layout.segment_ids[kv_idx]}
        return kv_idx <= q_idx or both == {PREFIX}


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [PrefixLM]
