"""Several generations that continue one prompt, against each run by itself."""

import dataclasses
from collections import Counter

import pytest

from flexmask.errors import OptionError
from flexmask.fusion import Fusion
from flexmask.plugins.registry import make_strategy
from flexmask.sampling import Sampling
from oracles import random_text_request, random_words

pytestmark = pytest.mark.usefixtures("without_inductor")

SAMPLING = Sampling(temperature=1.0, seed=3)
SAMPLES = 4
REQUESTS = [
    dataclasses.replace(random_text_request(seed, count, length=7 + seed), uuid=f"q{seed}")
    for seed, count in enumerate((3, 1, 2))
]
LONG = [
    dataclasses.replace(each, prefix=random_words(seed, 80)) for seed, each in enumerate(REQUESTS)
]


def run(engine, requests=REQUESTS, strategy="ensemble_isolation", **options):
    options = {"max_new_tokens": 6, "batch_size": 12, "sampling": SAMPLING} | options
    made = engine.generate(requests, strategy, **options)
    return list(made), made.stats


def tokens_of(generations):
    return [one.token_ids for one in generations]


def test_samples_differ_and_the_first_is_what_a_single_one_would_be(engine):
    single, _ = run(engine)
    sampled, _ = run(engine, samples=SAMPLES)
    assert [(one.request.uuid, one.sample) for one in sampled] == [
        (request.uuid, number) for request in REQUESTS for number in range(SAMPLES)
    ]
    assert tokens_of(sampled[::SAMPLES]) == tokens_of(single)
    assert len(set(tokens_of(sampled))) == len(sampled)


@pytest.mark.parametrize("fusion", ["each", "mean"])
def test_samples_do_not_depend_on_the_batch_or_on_their_number(engine, fusion):
    want, _ = run(engine, fusion=fusion, samples=SAMPLES)
    for batch_size, requests in ((12, REQUESTS[1:]), (3, REQUESTS)):
        found, _ = run(engine, requests, fusion=fusion, samples=2, batch_size=batch_size)
        asked = {request.uuid for request in requests}
        assert [(one.request, one.token_ids) for one in found] == [
            (one.request, one.token_ids)
            for one in want
            if one.sample < 2 and one.request.uuid in asked
        ]


@pytest.mark.parametrize(
    ("strategy", "fusion"),
    [
        *(("causal", "attention"), ("ensemble_isolation", "attention")),
        *(("ensemble_isolation", "mean"), ("ensemble_isolation", "vote")),
    ],
)
def test_a_prompt_is_computed_once_for_all_of_its_samples(engine, strategy, fusion):
    options = {"batch_size": 24, "max_new_tokens": 1}
    _, single = run(engine, LONG, strategy, fusion=fusion, **options)
    _, sampled = run(engine, LONG, strategy, fusion=fusion, samples=SAMPLES, **options)
    assert sampled.prompt_tokens == SAMPLES * single.prompt_tokens
    assert sampled.computed_tokens <= single.computed_tokens


def test_a_prompt_without_spans_is_computed_once_too(engine):
    strategy = make_strategy("dilated", {})
    single, once = run(engine, REQUESTS, strategy, max_new_tokens=2)
    sampled, stats = run(engine, REQUESTS, strategy, samples=SAMPLES, max_new_tokens=2)
    assert stats.computed_tokens == once.computed_tokens
    assert tokens_of(sampled[::SAMPLES]) == tokens_of(single)


def test_samples_wait_for_room_in_the_batch_so_that_their_prompt_is_computed_once(engine):
    _, single = run(engine, LONG, batch_size=SAMPLES + 1)
    _, sampled = run(engine, LONG, samples=SAMPLES, batch_size=SAMPLES + 1)
    assert sampled.prefills == len(LONG)
    assert sampled.computed_tokens <= single.computed_tokens + 2 * 80  # the cached prefix


def test_more_samples_than_rows_run_one_after_another(engine):
    few, _ = run(engine, samples=SAMPLES, batch_size=12)
    many, _ = run(engine, samples=SAMPLES, batch_size=2)
    assert tokens_of(many) == tokens_of(few)


@pytest.mark.parametrize(
    ("fusion", "counted"), [("vote", "each"), ("self_consistency", "attention")]
)
def test_a_vote_counts_the_samples_that_the_prompts_give(engine, fusion, counted):
    def answer_of(generation):
        return f"t{generation.token_ids[0] % 5}"  # few answers, so that some are equal

    samples, _ = run(engine, fusion=counted, samples=SAMPLES, batch_size=12)
    voted, _ = run(engine, fusion=fusion, samples=SAMPLES, answer_of=answer_of, batch_size=12)
    assert len(voted) == len(REQUESTS)
    for generation in voted:
        own = [one for one in samples if one.request.uuid == generation.request.uuid]
        own.sort(key=lambda one: one.sample)  # the first samples of all prompts come first
        votes = Counter(map(answer_of, own))
        most = max(votes.values())
        winner = next(one for one in own if votes[answer_of(one)] == most)
        assert generation.token_ids == winner.token_ids
        assert generation.request.segments == winner.request.segments or fusion == "vote"


def test_samples_of_fused_logits_are_groups_of_rows(engine):
    sampled, stats = run(engine, fusion="mean", samples=SAMPLES)
    assert len(sampled) == SAMPLES * len(REQUESTS)
    assert stats.prompt_tokens == sum(one.prompt_tokens for one in sampled)
    assert len(set(tokens_of(sampled))) == len(sampled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": None}, "4 samples need a temperature above 0, since at 0 all are the same"),
        ({"samples": 0}, "samples must be positive, got 0"),
        (
            {"fusion": "self_consistency", "samples": None},
            "fusion 'self_consistency' needs at least 2 samples, got 1",
        ),
    ],
)
def test_samples_that_cannot_differ_are_refused(engine, options, message):
    with pytest.raises(OptionError) as refused:
        run(engine, **{"samples": SAMPLES} | options)
    assert str(refused.value) == message


def test_samples_are_neither_streamed_nor_scored(engine):
    sampled = Fusion(samples=2)
    with pytest.raises(OptionError, match="'attention-2-samples' makes several generations"):
        engine.stream(REQUESTS[0], "causal", fusion=sampled, sampling=SAMPLING)
    with pytest.raises(OptionError, match="choices are scored once, got 2 samples"):
        engine.score(REQUESTS, "causal", fusion=sampled)
