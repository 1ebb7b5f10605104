"""Strategies that change scores, against dense attention with the same change."""

from dataclasses import dataclass

import pytest
import torch

from flexmask.attention.strategy_context import use_strategy
from flexmask.block_mask.cache import BlockMaskCache
from flexmask.check import check_strategy
from flexmask.engine.model_runner import ModelRunner
from flexmask.errors import AttentionError
from flexmask.layout import Layout, shared_prefix_layout
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import and_masks, causal, is_fusion_tail, is_prefix, or_masks, same_segment
from flexmask.strategy import Strategy, parameter
from oracles import dense_mask, make_model, random_request

STEPS, CAPACITY = 8, 640


@dataclass(frozen=True)
class TemperedSegments(Strategy):
    """The tail looks at segments with a temperature."""

    name = "tempered_segments"
    temperature: float = parameter(0.5, help="Below 1 sharpens.")

    def mask_mod(self, batch):
        return and_masks(
            causal, or_masks(is_prefix(batch), same_segment(batch), is_fusion_tail(batch))
        )

    def score_mod(self, batch):
        segment_ids, temperature = batch.segment_ids, self.temperature

        def tempered(score, b, h, q_idx, kv_idx):
            is_met = (segment_ids[b, kv_idx] > 0) & (segment_ids[b, q_idx] < 0)
            return torch.where(is_met, score / temperature, score)

        return tempered

    def layout(self, request):
        return shared_prefix_layout(request, "restart")

    def allowed(self, layout, q_idx, kv_idx):
        q, kv = layout.segment_ids[q_idx], layout.segment_ids[kv_idx]
        return kv_idx <= q_idx and (kv in (0, q) or q < 0)


def dense_tokens(model, strategy, layout, count):
    """Greedy tokens and their logits, everything run anew for each."""
    chosen: list[int] = []
    logits = []
    for _ in range(count):
        grown = layout.extended(len(chosen))
        grown = Layout((*layout.token_ids, *chosen), grown.segment_ids, grown.position_ids)
        batch = LayoutBatch(1, len(grown), model.device)
        batch.load([grown], [len(grown)], [0])
        with torch.no_grad():
            output = model(
                input_ids=grown.token_tensor[None].to(model.device),
                position_ids=grown.position_tensor[None].to(model.device),
                attention_mask=dense_mask(strategy, grown)[None, None].to(model.device),
                score_mod=strategy.score_mod(batch),
                use_cache=False,
            )
        logits.append(output.logits[0, -1])
        chosen.append(int(logits[-1].argmax()))
    return chosen, torch.stack(logits)


def decode(runner, strategy, layouts):
    runner.prepare(strategy, len(layouts), CAPACITY)
    runner.prefill(runner.plan(dict(enumerate(layouts))))
    token_ids = torch.tensor([[layout.token_ids[-1]] for layout in layouts], device=runner.device)
    logits = []
    for _ in range(STEPS):
        logits.append(runner.decode(token_ids))
        token_ids = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits, 1)


def test_changed_scores_equal_dense_attention(models, device):
    runner = ModelRunner(models("llama", "flexmask", device), BlockMaskCache())
    reference = make_model("llama", "flexmask_dense", device)
    strategy = TemperedSegments()
    layouts = [
        strategy.layout(random_request(1, 20, [30, 41, 25], 3)),
        strategy.layout(random_request(2, 7, [60, 20], 2)),
    ]
    logits = decode(runner, strategy, layouts)
    for row, layout in enumerate(layouts):
        tokens, want = dense_tokens(reference, strategy, layout, STEPS)
        assert logits[row].argmax(-1).tolist() == tokens
        assert (logits[row] - want).abs().max() < 1e-4
        _, unchanged = dense_tokens(reference, TemperedSegments(temperature=1.0), layout, 1)
        assert (unchanged[0] - want[0]).abs().max() > 1e-2  # the temperature matters
    assert set(runner.decode_kernels.values()) == {"flex_attention"}
    assert not runner.cache_prefix(layouts[0], 7)


def test_a_strategy_that_changes_scores_passes_the_check():
    assert check_strategy(TemperedSegments()) == []


def test_model_generate_refuses_a_strategy_that_changes_scores():
    layout = TemperedSegments().layout(random_request(1, 20, [30], 3))
    with (
        pytest.raises(AttentionError, match="'tempered_segments' changes scores"),
        use_strategy(TemperedSegments(), [layout]),
    ):
        pass
