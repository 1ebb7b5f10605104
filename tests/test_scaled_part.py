"""Parts of the keys whose log-sum-exp is scaled, against attention in two parts, merged."""

import math

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from flexmask.attention.model_masks import model_dense_mask
from flexmask.attention.placement import RowPlacement
from flexmask.attention.scaled_part import place_part, scaled_score_mod
from flexmask.attention.strategy_context import use_strategy
from flexmask.block_mask.cache import BlockMaskCache
from flexmask.engine.model_runner import ModelRunner
from flexmask.errors import AttentionError
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch
from flexmask_strategies.adaptive_parallel import AdaptiveParallel
from oracles import dense_mask, make_model, random_request

STEPS, CAPACITY = 32, 640


def attend(scores: Tensor, is_seen: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of dense attention."""
    scores = scores.masked_fill(~is_seen, -math.inf)
    return scores.softmax(-1).nan_to_num() @ values, scores.logsumexp(-1, keepdim=True)


def two_parts(
    module, query, key, value, attention_mask, scaling, *, strategy, segment_ids, **kwargs
):
    """APE as its pseudocode has it: documents and all else apart, merged by log-sum-exp."""
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ keys.transpose(-1, -2) * scaling
    is_document = attention_mask & (segment_ids < 0)[:, None] & (segment_ids > 0)
    documents, documents_lse = attend(scores / strategy.temperature, is_document, values)
    others, others_lse = attend(scores, attention_mask & ~is_document, values)
    documents_lse = documents_lse * strategy.scale * strategy.temperature
    is_seen = is_document.any(-1, keepdim=True)
    lses = torch.cat((documents_lse.where(is_seen, -math.inf), others_lse), -1)
    first, second = lses.softmax(-1).split(1, -1)
    return (first * documents + second * others).transpose(1, 2).contiguous(), None


def tokens_in_two_parts(model, strategy, layout, count=STEPS):
    """Greedy tokens and their logits, everything run anew for each."""
    chosen: list[int] = []
    logits = []
    for _ in range(count):
        grown = layout.extended(len(chosen))
        grown = Layout((*layout.token_ids, *chosen), grown.segment_ids, grown.position_ids)
        with torch.no_grad():
            output = model(
                input_ids=grown.token_tensor[None].to(model.device),
                position_ids=grown.position_tensor[None].to(model.device),
                attention_mask=dense_mask(strategy, grown)[None, None].to(model.device),
                strategy=strategy,
                segment_ids=grown.segment_tensor.to(model.device),
                use_cache=False,
            )
        logits.append(output.logits[0, -1])
        chosen.append(int(logits[-1].argmax()))
    return chosen, torch.stack(logits)


@pytest.fixture(scope="session")
def reference():
    AttentionInterface.register("two_parts", two_parts)
    AttentionMaskInterface.register("two_parts", model_dense_mask)
    return lambda device: make_model("llama", "two_parts", device)


def decode(runner, strategy, layouts):
    runner.prepare(strategy, len(layouts), CAPACITY)
    runner.prefill(runner.plan(dict(enumerate(layouts))))
    token_ids = torch.tensor([[layout.token_ids[-1]] for layout in layouts], device=runner.device)
    logits = []
    for _ in range(STEPS):
        logits.append(runner.decode(token_ids))
        token_ids = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits, 1)


def test_adaptive_parallel_encoding_equals_attention_in_two_parts(models, reference, device):
    strategy, model = AdaptiveParallel(temperature=0.5, scale=0.7), reference(device)
    runner = ModelRunner(models("llama", "flexmask", device), BlockMaskCache())
    layouts = [
        strategy.layout(random_request(1, 20, [30, 41, 25], 9)),
        strategy.layout(random_request(2, 0, [60, 20], 2)),
    ]
    logits = decode(runner, strategy, layouts)
    for row, layout in enumerate(layouts):
        tokens, want = tokens_in_two_parts(model, strategy, layout)
        assert logits[row].argmax(-1).tolist() == tokens
        assert (logits[row] - want).abs().max() < 1e-4
        for other in (AdaptiveParallel(0.5, 1.0), AdaptiveParallel(1.0, 0.7)):
            _, changed = tokens_in_two_parts(model, other, layout, 1)
            assert (changed[0] - want[0]).abs().max() > 1e-2  # both of them matter
    assert set(runner.decode_kernels.values()) == {"flex_attention"}
    assert runner.cache_prefix(layouts[0], 20)  # the tail alone is scaled


@pytest.mark.parametrize("spread", [1.0, 20.0, 60.0])
def test_the_weights_of_a_part_are_scaled_however_far_scores_lie_apart(spread):
    strategy = AdaptiveParallel(temperature=0.8, scale=0.6)
    layout = strategy.layout(random_request(5, 9, [30, 50], 21))
    size = len(layout)
    batch = LayoutBatch(1, size, torch.device("cpu"))
    batch.load([layout], [size], [0])
    placed = place_part(strategy.scaled_part(batch), RowPlacement(torch.arange(size)[None]))
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, h, size, 16, generator=generator) for h in (4, 2))
    query *= spread
    axes = (torch.arange(n).view(-1, *[1] * i) for n, i in ((1, 3), (4, 2), (size, 1), (size, 0)))
    b, h, q_idx, kv_idx = axes
    is_seen = dense_mask(strategy, layout)

    def dense_attention(values, score_mod):
        scores = query @ key.repeat_interleave(2, 1).mT / 4
        scores = score_mod(scores, b, h, q_idx, kv_idx).masked_fill(~is_seen, -math.inf)
        return scores.softmax(-1) @ values.repeat_interleave(2, 1)

    assert placed is not None
    mods = (placed, strategy.score_mod(batch))
    score_mod = scaled_score_mod(*mods, query, key, key, None, dense_attention)
    values = torch.randn(1, 2, size, 8, generator=generator)
    want, _ = two_parts(
        None, query, key, values, is_seen, 0.25, strategy=strategy,
        segment_ids=layout.segment_tensor,
    )  # fmt: skip
    got = dense_attention(values, score_mod).transpose(1, 2)
    torch.testing.assert_close(got, want, atol=1e-5 * spread, rtol=0)


def test_a_part_scaled_by_one_is_none():
    strategy, slots = AdaptiveParallel(temperature=2.0, scale=0.5), torch.zeros(1, 8)
    batch = LayoutBatch(1, 8, torch.device("cpu"))
    assert place_part(strategy.scaled_part(batch), RowPlacement(slots)) is None
    assert place_part(AdaptiveParallel().scaled_part(batch), RowPlacement(slots)) is not None


def test_float16_is_refused():
    runner = ModelRunner(make_model("llama", "flexmask").half(), BlockMaskCache())
    with pytest.raises(AttentionError, match="load the model in bfloat16 or float32"):
        runner.prepare(AdaptiveParallel(), 2, CAPACITY)


def test_model_generate_refuses_a_scaled_part():
    layout = AdaptiveParallel().layout(random_request(1, 20, [30], 3))
    with (
        pytest.raises(AttentionError, match="'adaptive_parallel' changes scores"),
        use_strategy(AdaptiveParallel(), [layout]),
    ):
        pass
