"""A strategy for prompts that several choices continue, each as if it were the only one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.layout_batch import LayoutBatch
from flexmask.strategy import ScaledPart, Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from flexmask.layout import Layout, TokenizedRequest
    from flexmask.mod_types import MaskMod, RowMod, ScoreMod


@dataclass(frozen=True)
class ChoiceStrategy(Strategy):
    """Composes the mask of any strategy with one that isolates choices from each other.

    The strategy is asked about each pair as if the choice's tokens stood directly after the
    prompt. Besides, a choice's tokens see none of another choice, and no token sees a later one of
    a choice, as when a token is generated after the other. ``q`` down, ``kv`` across, for
    ``prefix_segment``, with choices A of two tokens and B of one::

            P 1 2 T A A B
          P #
          1 # #
          2 #   #
          T # # # #
          A # # # # #
          A # # # # # #
          B # # # #     #

    Attributes:
        base: The strategy.
    """

    base: Strategy

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the strategy, for messages."""
        return self.base.name

    def layout(self, request: TokenizedRequest) -> Layout:
        """Plan the prompt as the strategy does, without choices."""
        return self.base.layout(request)

    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        """Build the composed mask."""
        choice_ids, tail_slots = batch.choices
        base = self.base.mask_mod(batch)

        def with_choices(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            q_choice, kv_choice = choice_ids[b, q_idx], choice_ids[b, kv_idx]
            of_prompt = kv_choice == 0
            of_choice = (kv_choice == q_choice) & (kv_idx <= q_idx)
            is_seen = base(b, h, tail_slots[b, q_idx], tail_slots[b, kv_idx])
            return is_seen & (of_prompt | of_choice)

        return with_choices

    def score_mod(self, batch: LayoutBatch) -> ScoreMod | None:
        """Build the strategy's change of scores."""
        tail_slots, base = batch.choices.tail_slots, self.base.score_mod(batch)
        if base is None:
            return None

        def with_choices(
            score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
        ) -> Tensor:
            return base(score, b, h, tail_slots[b, q_idx], tail_slots[b, kv_idx])

        return with_choices

    def scored_queries(self, batch: LayoutBatch) -> RowMod | None:
        """Build the strategy's choice of queries whose scores may change."""
        tail_slots, base = batch.choices.tail_slots, self.base.scored_queries(batch)
        if base is None:
            return None
        return lambda b, slot: base(b, tail_slots[b, slot])

    def scaled_part(self, batch: LayoutBatch) -> ScaledPart | None:
        """Build the strategy's scaled part."""
        tail_slots, base = batch.choices.tail_slots, self.base.scaled_part(batch)
        if base is None:
            return None

        def of_tail_slots(is_in: RowMod) -> RowMod:
            return lambda b, slot: is_in(b, tail_slots[b, slot])

        return ScaledPart(of_tail_slots(base.queries), of_tail_slots(base.keys), base.scale)
