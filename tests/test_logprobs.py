"""Log-probabilities of generated tokens, against dense passes over prompt and generation."""

import math

import pytest
import torch

from flexmask import Generation, RequestTokenizer, Sampling
from flexmask.engine import Engine
from flexmask.errors import OptionError
from flexmask.fusion import Fusion
from flexmask.layout import Layout
from flexmask.plugins.registry import make_strategy
from oracles import dense_mask, make_model, oracle_logits, random_text_request

REQUESTS = [random_text_request(seed, 2, length=6 + seed) for seed in range(3)]
COUNT = 5


@pytest.fixture(scope="module")
def dense_model():
    return make_model("llama", "sdpa")


def oracle(engine: Engine, dense_model, generation: Generation, strategy: str, fusion: str):
    """The log-probabilities ``(T, V)`` by which the tokens of a generation were chosen."""
    chosen, tokenize = make_strategy(strategy, {}), RequestTokenizer(engine.tokenizer)
    ((_, prompts),) = Fusion(fusion).prompts(generation.request)
    of_prompts = []
    for prompt in prompts:
        layout, new = chosen.layout(tokenize(prompt)), generation.token_ids
        grown = layout.extended(len(new))
        grown = Layout((*layout.token_ids, *new), grown.segment_ids, grown.position_ids)
        dense = dense_mask(chosen, grown)
        logits = oracle_logits(dense_model, grown, dense, dense)
        of_prompts.append(logits[len(layout) - 1 : -1])
    if fusion == "mean_prob":
        return torch.stack(of_prompts).softmax(-1).mean(0).log()
    return torch.stack(of_prompts).mean(0).log_softmax(-1)


@pytest.mark.parametrize(
    ("strategy", "fusion"),
    [("ensemble_isolation", "attention"), ("causal", "mean"), ("causal", "mean_prob")],
)
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.7, top_k=20, seed=3)])
def test_logprobs_are_those_of_the_distribution_after_fusion_and_before_temperature(
    engine, dense_model, strategy, fusion, sampling
):
    run = engine.generate(
        REQUESTS,
        strategy,
        fusion=fusion,
        sampling=sampling,
        max_new_tokens=COUNT,
        batch_size=6,
        top_logprobs=4,
    )
    for generation in run:
        want = oracle(engine, dense_model, generation, strategy, fusion)
        assert generation.logprobs is not None
        assert generation.top_logprobs is not None
        own = want.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(generation.logprobs), own, atol=1e-5, rtol=0)
        for top, of_all in zip(generation.top_logprobs, want, strict=True):
            values, token_ids = of_all.topk(4)
            assert [one.token_id for one in top] == token_ids.tolist()
            assert [one.logprob for one in top] == pytest.approx(values.tolist(), abs=1e-5)
            assert [one.text for one in top] == [
                RequestTokenizer(engine.tokenizer).decode((one.token_id,)) for one in top
            ]


def test_without_asking_there_are_none_and_tokens_are_the_same(engine):
    plain = list(engine.generate(REQUESTS, "causal", max_new_tokens=COUNT, batch_size=3))
    run = engine.generate(REQUESTS, "causal", max_new_tokens=COUNT, batch_size=3, logprobs=True)
    for without, scored in zip(plain, run, strict=True):
        assert without.logprobs is without.top_logprobs is None
        assert scored.token_ids == without.token_ids
        assert scored.logprobs is not None
        assert len(scored.logprobs) == len(scored.token_ids)
        assert scored.top_logprobs == ((),) * COUNT


def test_a_row_that_starts_later_has_its_own_logprobs(engine):
    def run(batch_size):
        return engine.generate(
            REQUESTS, "causal", max_new_tokens=COUNT, batch_size=batch_size, top_logprobs=1
        )

    for one, other in zip(run(1), run(2), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_excluded_tokens_are_not_among_the_most_likely(engine, monkeypatch):
    config = engine.model.generation_config
    (first,) = engine.generate(REQUESTS[:1], "causal", max_new_tokens=1, top_logprobs=2)
    assert first.top_logprobs is not None
    best = first.top_logprobs[0][0].token_id
    allowed = first.top_logprobs[0][1].token_id
    vocabulary = engine.model.config.vocab_size
    excluded = [token for token in range(vocabulary) if token != allowed]
    monkeypatch.setattr(config, "suppress_tokens", excluded)
    (only,) = engine.generate(REQUESTS[:1], "causal", max_new_tokens=1, top_logprobs=2)
    assert only.token_ids == (allowed,) != (best,)
    assert only.logprobs == (0.0,)
    assert [[one.token_id for one in top] for top in only.top_logprobs] == [[allowed]]


def test_a_streamed_generation_has_them_too(engine):
    stream = engine.stream(REQUESTS[0], "causal", max_new_tokens=COUNT, logprobs=True)
    list(stream)
    assert math.isfinite(sum(stream.generation.logprobs))


@pytest.mark.parametrize(
    ("number", "message"),
    [(-1, "top_logprobs must not be negative"), (10**6, "top_logprobs must be at most")],
)
def test_an_impossible_number_is_refused(engine, number, message):
    with pytest.raises(OptionError, match=message):
        engine.generate(REQUESTS, "causal", top_logprobs=number)
