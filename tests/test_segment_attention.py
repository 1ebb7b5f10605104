"""Where generated tokens attend to, against dense attention over the whole row."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flexmask.attention import backend, measuring_mask
from flexmask.attention.dense_weights import dense_weights
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine import Engine
from flexmask.errors import OptionError
from flexmask.layout import TAIL
from flexmask.layout_batch import LayoutBatch
from flexmask.plugins.registry import make_strategy
from flexmask.sampling import Sampling
from oracles import (
    WINDOW,
    dense_mask,
    make_model,
    oracle_logits,
    random_text_request,
    within_window,
)
from plugin_site import BUILT_IN
from test_scoring import NARROW, dense_logprobs, with_tokens

pytestmark = pytest.mark.usefixtures("without_inductor")

REQUESTS = [
    replace(random_text_request(seed, count, length=6 + seed), uuid=f"q{seed}")
    for seed, count in enumerate((3, 1, 2))
]


def run(engine, strategy, requests=REQUESTS, **options):
    options = {"max_new_tokens": 5, "batch_size": 2, "segment_attention": True} | options
    return list(engine.generate(requests, strategy, **options))


@pytest.fixture
def weights_of(models, monkeypatch):
    """Runs a dense pass; returns the mean of attention weights over heads and layers.

    The pass is transformers' own, under the plain-Python oracle; where a strategy changes scores,
    it is that of ``flexmask_dense``.
    """

    def get(architecture, strategy, layout) -> Tensor:
        seen: list[Tensor] = []
        if not strategy.changes_scores(LayoutBatch(1, 1, torch.device("cpu"))):
            model = models(architecture, "eager")
            dense = near = dense_mask(strategy, layout)
            if (window := getattr(model.config, "sliding_window", None)) is not None:
                near = dense & within_window(layout, window)
            with recorded_weights(model, seen):
                oracle_logits(model, layout, dense, near)
        else:

            def record(*arguments, **options):
                seen.append(dense_weights(*arguments, **options))
                return seen[-1]

            monkeypatch.setattr(backend, "dense_weights", record)
            dense_logprobs(models(architecture, "flexmask_dense"), strategy, layout)
            monkeypatch.undo()
        return torch.stack([weights[0].mean(0) for weights in seen]).mean(0)

    return get


@contextmanager
def recorded_weights(model, seen):
    """Append the attention weights that attention modules return, ``(1, H, S, S)`` each."""
    hooks = [
        module.register_forward_hook(lambda _, __, output: seen.append(output[1]))
        for name, module in model.named_modules()
        if name.endswith("self_attn")
    ]
    yield
    for hook in hooks:
        hook.remove()


def shares_of(weights: Tensor, layout, prompt_length: int, num_segments: int) -> Tensor:
    ids = torch.tensor(layout.segment_ids)
    parts = [*range(num_segments + 1), TAIL]
    queries = slice(prompt_length - 1, len(layout))
    return torch.stack([weights[queries, ids == part].sum(-1) for part in parts], -1)


def check(engine, architecture, strategy, generations, weights_of):
    tokenize = RequestTokenizer(engine.tokenizer)
    for generation in generations:
        prompt = strategy.layout(tokenize(generation.request))
        layout = with_tokens(prompt, generation.token_ids[:-1])
        weights = weights_of(architecture, strategy, layout)
        count = prompt.num_segments
        want = shares_of(weights, layout, len(prompt), count)
        found = torch.tensor(generation.segment_attention)
        assert found.shape == (len(generation.token_ids), count + 2)
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.sum(-1), torch.ones(len(found)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BUILT_IN)
def test_shares_are_those_of_dense_attention(engine, name, weights_of):
    strategy = make_strategy(name, NARROW.get(name, {}))
    generations = run(engine, strategy)
    check(engine, "llama", strategy, generations, weights_of)
    if name != "boundary_repair":  # its layout has segments of its own
        shapes = [len(one.segment_attention[0]) for one in generations]
        assert shapes == [len(one.segments) + 2 for one in REQUESTS]
    if name == "ensemble_isolation":  # copies of the prefix belong to segments
        assert all(one.segment_attention[-1][0] == 0 for one in generations)


def test_sliding_layers_and_capped_scores_count_as_the_model_computes_them(tokenizer, weights_of):
    engine = Engine(make_model("gemma2", "flexmask"), tokenizer)
    strategy = make_strategy("prefix_segment", {})
    requests = [random_text_request(1, 2, length=WINDOW - 8)]
    generations = run(engine, strategy, requests, batch_size=1)
    check(engine, "gemma2", strategy, generations, weights_of)


def test_measuring_changes_no_generation_and_costs_nothing_where_it_is_not_asked_for(engine):
    plain = run(engine, "ensemble_isolation", segment_attention=False)
    assert all(one.segment_attention is None for one in plain)
    measured = run(engine, "ensemble_isolation")
    assert [replace(one, segment_attention=None) for one in measured] == plain
    together = run(engine, "ensemble_isolation", batch_size=3)
    for one, other in zip(measured, together, strict=True):
        assert other.token_ids == one.token_ids
        found, want = map(torch.tensor, (other.segment_attention, one.segment_attention))
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


def test_it_is_measured_some_queries_at_a_time(engine, monkeypatch):
    whole = run(engine, "causal")
    monkeypatch.setattr(measuring_mask, "MAX_WEIGHTS", 1)
    for one, other in zip(whole, run(engine, "causal"), strict=True):
        found, want = map(torch.tensor, (other.segment_attention, one.segment_attention))
        torch.testing.assert_close(found, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("fusion", "samples"), [("vote", 2), ("self_consistency", 2)])
def test_of_a_vote_it_is_that_of_the_winner(engine, weights_of, fusion, samples):
    strategy = make_strategy("prefix_segment", {})
    sampling = Sampling(temperature=1.0)
    options = {"batch_size": 6, "fusion": fusion, "samples": samples, "sampling": sampling}
    generations = run(engine, strategy, **options)
    if fusion == "vote":
        alone = run(engine, strategy, **options | {"fusion": "each"})
        of_tokens = {(one.request.uuid, one.token_ids): one for one in alone}
        winners = [of_tokens[one.request.uuid, one.token_ids] for one in generations]
        for one, other in zip(generations, winners, strict=True):
            found, want = map(torch.tensor, (one.segment_attention, other.segment_attention))
            torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    else:
        check(engine, "llama", strategy, generations, weights_of)


def test_fused_logits_have_no_prompt_to_attend_to(engine):
    with pytest.raises(OptionError, match="is that of one prompt, but fusion 'mean' fuses the"):
        run(engine, "causal", fusion="mean")
