"""Measures which parts of their prompts generated tokens attend to, in a pass of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from flexmask.attention.measuring_mask import Measurement, MeasuringMask
from flexmask.attention.model_probe import WHOLE_MODEL
from flexmask.attention.placement import RowPlacement, placed_mask, placed_score
from flexmask.attention.scaled_part import place_part
from flexmask.engine.executor import Executor
from flexmask.engine.model_runner import bucketed_capacity
from flexmask.engine.turns import TURN
from flexmask.generation import SegmentAttention
from flexmask.layout import PADDING, TAIL, Layout
from flexmask.mask_mods import layer_masks
from flexmask.strategy import Strategy

Generated = tuple[Layout, Sequence[int]]
"""A prompt, and the tokens that were generated after it."""


class AttentionMeter:
    """Measures the attention of generated tokens, on an executor that others use too.

    Prompts are computed again, as for generating, and copied where they are in a cache. Then one
    pass of the model, layer by layer and not compiled, runs over the tokens that predict the
    generated ones: the last one of the prompt, and all generated tokens but the last.
    """

    def __init__(self, executor: Executor, strategy: Strategy) -> None:
        """Store what measuring needs; the executor is prepared when there is something."""
        self._executor = executor
        self._strategy = strategy

    def settle(self) -> None:
        """Do nothing: no prompt is in flight when another run takes its turn."""

    def measured(
        self, generated: Iterable[Generated], batch_size: int, capacity: int
    ) -> list[SegmentAttention]:
        """Measure the attention of generated tokens.

        Args:
            generated: Prompts and their tokens.
            batch_size: Rows that the executor is prepared for.
            capacity: Slots per row, if the longest of them does not need more.
        """
        found: list[SegmentAttention] = []
        rest = iter(generated)
        while some := list(islice(rest, batch_size)):
            longest = max(len(layout) for layout, _ in some)
            needed = longest + max(len(token_ids) for _, token_ids in some)
            slots = capacity if needed <= capacity else bucketed_capacity(needed)
            with TURN:
                self._executor.occupancy.admit(self)
                self._executor.runner.prepare(self._strategy, batch_size, slots)
                found += self._measure(some)
        return found

    @torch.no_grad()
    def _measure(self, generated: Sequence[Generated]) -> list[SegmentAttention]:
        runner = self._executor.runner
        bound, device = runner.bound, runner.device
        runner.prefill(runner.plan({row: layout for row, (layout, _) in enumerate(generated)}))
        counts = [len(token_ids) for _, token_ids in generated]
        token_ids = torch.zeros(len(counts), max(counts), dtype=torch.long)
        for row, (layout, tokens) in enumerate(generated):
            read = (layout.token_ids[-1], *tokens[:-1])
            token_ids[row, : len(read)] = torch.tensor(read)
        firsts = torch.tensor([[len(layout) - 1] for layout, _ in generated])
        slots = (firsts + torch.arange(max(counts))).to(device)
        num_parts = 2 + max(layout.num_segments for layout, _ in generated)
        to = Measurement(
            slots,
            counts,
            _parts(bound.batch.segment_ids[: len(counts)], num_parts),
            runner.cache.by_module(self._executor.model),
            torch.zeros(*slots.shape, num_parts, device=device),
        )
        places = RowPlacement(slots)
        masks = {
            kind: MeasuringMask.for_pass(to, placed_mask(mask_mod, places))
            for kind, mask_mod in layer_masks(
                self._strategy, bound.batch, runner.layer_windows
            ).items()
        }
        self._executor.model.base_model(
            input_ids=token_ids.to(device),
            position_ids=bound.batch.position_ids[: len(counts)].gather(1, slots).long(),
            attention_mask=masks.get(WHOLE_MODEL, masks),
            use_cache=False,
            score_mod=placed_score(self._strategy.applied_score_mod(bound.batch), places),
            scaled_part=place_part(self._strategy.scaled_part(bound.batch), places),
        )
        shares = (to.weights / to.num_layers).cpu()
        return [
            _rows_of(of_row[:count], layout.num_segments)
            for of_row, count, (layout, _) in zip(shares, counts, generated, strict=True)
        ]


def _parts(segment_ids: Tensor, num_parts: int) -> Tensor:
    """Number the parts of prompts: the prefix 0, segments from 1, and the tail last."""
    is_last = (segment_ids == TAIL) | (segment_ids == PADDING)
    return segment_ids.masked_fill(is_last, num_parts - 1).long()


def _rows_of(shares: Tensor, num_segments: int) -> SegmentAttention:
    """Return a row of shares for each token, of a prompt of fewer segments than the most."""
    own = torch.cat((shares[:, : num_segments + 1], shares[:, -1:]), 1)
    return tuple(map(tuple, own.tolist()))
