"""Documents do not see each other; the tail sees them with a temperature and a scale.

APE, adaptive parallel encoding (Yang et al., ICLR 2025, arXiv:2502.05431). The shared prefix is
stored once, every document starts right after it, and the tail continues after the longest. When
the tail attends, scores of documents are divided by ``temperature``, and their log-sum-exp is
multiplied by ``scale * temperature``, as in the authors' code; other scores are unchanged. ``q``
down, ``kv`` across, prefix P, documents 1 and 2, tail T, positions on top::

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
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.errors import StrategyError
from flexmask.layout import PREFIX, TAIL, Layout, TokenizedRequest, shared_prefix_layout
from flexmask.mask_mods import and_masks, causal, is_fusion_tail, is_prefix, or_masks, same_segment
from flexmask.plugins.hookspecs import hookimpl
from flexmask.strategy import ScaledPart, Strategy, parameter

if TYPE_CHECKING:
    from torch import Tensor

    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod, RowMod, ScoreMod


@dataclass(frozen=True)
class AdaptiveParallel(Strategy):
    """Documents see the prefix and themselves; the tail sees all, tempered and scaled."""

    name = "adaptive_parallel"
    temperature: float = parameter(0.9, help="Divides the tail's scores of documents; above 0.")
    scale: float = parameter(0.9, help="Factor of the documents' log-sum-exp; above 0.")

    def __post_init__(self) -> None:
        for name, value in self.parameter_values().items():
            if not 0 < float(value) < float("inf"):
                raise StrategyError(f"{name} must be a positive number, got {value}")
        super().__post_init__()

    def layout(self, request: TokenizedRequest) -> Layout:
        return shared_prefix_layout(request, "restart")

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        visible = or_masks(same_segment(batch), is_prefix(batch), is_fusion_tail(batch))
        return and_masks(causal, visible)

    def score_mod(self, batch: LayoutBatch) -> ScoreMod:
        is_tail, is_document, temperature = _is_tail(batch), _is_document(batch), self.temperature

        def tempered(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            is_tempered = is_tail(b, q_idx) & is_document(b, kv_idx)
            return (score / temperature).where(is_tempered, score)

        return tempered

    def scored_queries(self, batch: LayoutBatch) -> RowMod:
        return _is_tail(batch)

    def scaled_part(self, batch: LayoutBatch) -> ScaledPart:
        return ScaledPart(_is_tail(batch), _is_document(batch), self.scale * self.temperature)

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        q_segment, kv_segment = layout.segment_ids[q_idx], layout.segment_ids[kv_idx]
        return kv_idx <= q_idx and (q_segment == TAIL or kv_segment in (q_segment, PREFIX))


def _is_tail(batch: LayoutBatch) -> RowMod:
    segment_ids = batch.segment_ids
    return lambda b, q_idx: segment_ids[b, q_idx] == TAIL


def _is_document(batch: LayoutBatch) -> RowMod:
    segment_ids = batch.segment_ids
    return lambda b, kv_idx: segment_ids[b, kv_idx] > PREFIX


@hookimpl
def register_strategies() -> Iterable[type[Strategy]]:
    return [AdaptiveParallel]
