"""Fused logits against each prompt run alone, densely, and fused by hand."""

import dataclasses
from collections import Counter

import pytest
import torch

from flexmask.engine.logit_fusion import LogitFusion
from flexmask.errors import FlexMaskWarning, ModelError, RequestError
from flexmask.fusion import Fusion
from flexmask.sampling import Sampling
from oracles import random_text_request

STEPS = 32
EOS = 2
WEIGHTS = (0.3, 1.0, 0.0, 2.5)
OF_LOGITS = [
    Fusion("mean"),
    Fusion("mean_prob"),
    Fusion("max"),
    Fusion("weighted_mean", "column"),
    Fusion("weighted_mean", "confidence"),
    Fusion("weighted_max", "column"),
    Fusion("weighted_max", "confidence"),
]


def request(seed, num_segments):
    plain = random_text_request(seed, num_segments, length=5 + 3 * seed)
    weights = tuple(WEIGHTS[index % len(WEIGHTS)] for index in range(num_segments))
    return dataclasses.replace(plain, weights=weights)


REQUESTS = [request(seed, count) for seed, count in enumerate((3, 1, 4, 2, 4, 3))]


def run(engine, fusion, requests=REQUESTS, **options):
    options = {"max_new_tokens": STEPS, "batch_size": 5} | options
    return engine.generate(requests, "ensemble_isolation", fusion=fusion, **options)


def ids_of(asked, segment):
    text = f"{asked.prefix} {segment} {asked.suffix}"
    return [1, *(int(word.removeprefix("t")) for word in text.split())]


def fused_by_hand(fusion, logits, weights):
    """Scores ``(V,)`` of logits ``(N, V)``, written as the documents say it."""
    probabilities = logits.double().softmax(-1)
    if fusion.weights == "confidence":
        weights = [float(row.max()) for row in probabilities]
    elif fusion.weights is None:
        weights = [1.0] * len(logits)
    if fusion.name == "mean_prob":
        return probabilities.mean(0).log()
    if "mean" in fusion.name:
        return sum(w * row.double() for w, row in zip(weights, logits, strict=True)) / sum(weights)
    weighted = [w * row for w, row in zip(weights, probabilities, strict=True)]
    return torch.stack(weighted).max(0).values.log()


def dense_run(model, fusion, asked):
    """Greedy tokens and the scores that chose them; every prompt is run anew for each token."""
    prompts = [ids_of(asked, segment) for segment in asked.segments]
    chosen: list[int] = []
    scores = []
    while len(chosen) < STEPS and EOS not in chosen:
        with torch.no_grad():
            rows = [model(torch.tensor([ids + chosen])).logits[0, -1] for ids in prompts]
        scores.append(fused_by_hand(fusion, torch.stack(rows), asked.weights))
        chosen.append(int(scores[-1].argmax()))
    return tuple(chosen), torch.stack(scores)


@pytest.fixture
def recorded(monkeypatch):
    """The scores ``(B, V)`` of each step; the first step and the rows of each group."""
    steps: list[torch.Tensor] = []
    groups: list[tuple[int, list[int]]] = []
    fuse, load = LogitFusion.__call__, LogitFusion.load

    def record_step(self, logits):
        steps.append(fuse(self, logits))
        return steps[-1]

    def record_load(self, loaded):
        groups.extend((len(steps), rows) for rows, _ in loaded)
        load(self, loaded)

    monkeypatch.setattr(LogitFusion, "__call__", record_step)
    monkeypatch.setattr(LogitFusion, "load", record_load)
    return steps, groups


@pytest.mark.parametrize("fusion", OF_LOGITS, ids=str)
def test_fused_logits_and_tokens_equal_those_of_prompts_run_alone(
    engine, models, fusion, recorded
):
    steps, groups = recorded
    generations = list(run(engine, fusion))
    sizes = [len(rows) for _, rows in groups]
    assert sorted(sizes) == sorted(len(one.segments) for one in REQUESTS)
    scores_by_tokens = scores_of_groups(steps, groups)
    for asked, generation in zip(REQUESTS, generations, strict=True):
        want, want_scores = dense_run(models("llama", "eager"), fusion, asked)
        assert generation.request == asked
        assert generation.token_ids == want
        scores = scores_by_tokens[want]
        if fusion.is_max:  # probabilities, which need not add up to one
            scores, want_scores = scores.softmax(-1), want_scores.softmax(-1)
        torch.testing.assert_close(scores, want_scores.float(), atol=1e-4, rtol=0)


def scores_of_groups(steps, groups):
    """Scores ``(T, V)`` of each group by the tokens they chose; those of its rows are the same."""
    found: dict[tuple[int, ...], torch.Tensor] = {}
    for start, rows in groups:
        of_group = torch.stack(steps[start : start + STEPS])[:, rows]
        tokens = of_group[:, 0].argmax(-1).tolist()
        length = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
        assert (of_group[:length] == of_group[:length, :1]).all()
        found[tuple(tokens[:length])] = of_group[:length, 0]
    return found


def test_each_prompt_alone_gives_what_it_gives_alone(engine, models):
    each = run(engine, "each")
    generations = list(each)
    alone = [one for asked in REQUESTS for one in asked.alone()]
    assert [generation.request for generation in generations] == alone
    for generation in generations[:8]:
        want, _ = dense_run(models("llama", "eager"), Fusion("mean"), generation.request)
        assert generation.token_ids == want
    assert each.stats.generations == len(alone)


def test_none_is_the_first_of_each(engine):
    options = {"sampling": Sampling(temperature=1.0, seed=4), "max_new_tokens": 4}
    each = list(run(engine, "each", **options))
    first = [generation for generation in each if generation.request.segment == 1]
    assert list(run(engine, "none", **options)) == first


def test_a_vote_is_the_first_prompt_of_those_that_answer_as_most_do(engine):
    def answer(generation):
        return "odd" if generation.token_ids[0] % 2 else "Even."

    options = {"sampling": Sampling(temperature=1.0, seed=4), "max_new_tokens": 2}
    each = list(run(engine, "each", **options))
    votes = list(run(engine, "vote", answer_of=answer, **options))
    outvoted = 0
    for asked, vote in zip(REQUESTS, votes, strict=True):
        own = [one for one in each if one.request.uuid == asked.uuid]
        ((winner, _),) = Counter(map(answer, own)).most_common(1)
        first = next(one for one in own if answer(one) == winner)
        assert (vote.request, vote.token_ids) == (asked, first.token_ids)
        outvoted += first != own[0]
    assert outvoted


@pytest.mark.parametrize("name", ["mean", "vote"])
def test_tokens_of_all_prompts_are_counted_and_those_they_share_once(engine, name):
    results = run(engine, name)
    generations = list(results)
    prompt_tokens = [sum(len(ids_of(r, segment)) for segment in r.segments) for r in REQUESTS]
    assert [generation.prompt_tokens for generation in generations] == prompt_tokens
    assert results.stats.generations == len(REQUESTS)
    assert results.stats.prompt_tokens == sum(prompt_tokens)
    assert results.stats.generated_tokens == sum(len(g.token_ids) for g in generations)


@pytest.mark.parametrize("name", ["mean", "max"])
def test_what_is_sampled_depends_on_seed_and_request_alone(engine, name):
    hot = Sampling(temperature=2.0, top_k=50, top_p=0.9, seed=1)
    options = {"sampling": hot, "max_new_tokens": 8}
    whole = list(run(engine, name, **options))
    assert list(run(engine, name, REQUESTS[::-1], **options)) == whole[::-1]
    for asked, generation in zip(REQUESTS, whole, strict=True):
        assert list(run(engine, name, [asked], **options)) == [generation]
    again = Sampling(temperature=2.0, top_k=50, top_p=0.9, seed=2)
    assert list(run(engine, name, **options | {"sampling": again})) != whole


def test_another_fusion_of_a_later_run_is_not_mistaken_for_the_first(engine):
    before = list(run(engine, "mean"))
    assert list(run(engine, "max")) != before
    assert list(run(engine, "mean")) == before


def test_a_batch_never_splits_a_request(engine):
    batches = [[len(g.request.segments) for g in batch] for batch in run(engine, "mean").batches()]
    assert all(sum(batch) <= 5 for batch in batches)
    assert sorted(size for batch in batches for size in batch) == [1, 2, 3, 3, 4, 4]


def test_a_batch_size_of_its_own_choice_holds_whole_requests(engine):
    of_three = [request(seed, 3) for seed in range(4)]
    assert run(engine, "mean", of_three, batch_size=None).stats.batch_size == 6
    assert run(engine, "mean", REQUESTS[:3], batch_size=None).stats.batch_size == 8
    assert run(engine, "mean", REQUESTS, batch_size=None).stats.batch_size == 8
    assert run(engine, "mean", REQUESTS[:2], batch_size=None).stats.batch_size == 4
    nine = [request(1, 9)]
    assert run(engine, "mean", nine, batch_size=None).stats.batch_size == 9
    assert run(engine, "each", nine, batch_size=None).stats.batch_size == 8


def test_a_request_of_more_prompts_than_a_batch_has_rows_is_refused(engine):
    message = "request 'row2': its 4 prompts run together, which takes a batch size of 4, got 3"
    with pytest.raises(RequestError, match=message):
        run(engine, "mean", batch_size=3)
    refused = []
    options = {"max_new_tokens": 1, "batch_size": 3}
    kept = run(engine, "vote", on_refused=lambda *pair: refused.append(pair), **options)
    assert [g.request for g in kept] == [one for one in REQUESTS if len(one.segments) < 4]
    assert [asked for asked, _ in refused] == [REQUESTS[2], REQUESTS[4]]


def test_out_of_memory_keeps_the_prompts_of_a_request_together(engine, monkeypatch):
    expected = list(run(engine, "mean", max_new_tokens=4))
    prefill, sizes = engine.runner.prefill, []

    def prefill_with_little_memory(plan):
        sizes.append(len(plan.rows))
        if len(plan.rows) > 5:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return prefill(plan)

    monkeypatch.setattr(engine.runner, "prefill", prefill_with_little_memory)
    results = run(engine, "mean", max_new_tokens=4, batch_size=10)
    with pytest.warns(FlexMaskWarning, match="10 rows at a time become 5"):
        assert list(results) == expected
    assert sizes[0] == 9
    assert max(sizes[1:]) == 5


def test_a_request_too_large_for_the_memory_says_so(engine, monkeypatch):
    def prefill_without_memory(plan):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine.runner, "prefill", prefill_without_memory)
    results = run(engine, "mean", batch_size=5)
    message = "not enough memory for the 4 rows of a request of 640 slots; shorten .* segments"
    with (
        pytest.warns(FlexMaskWarning, match="5 rows at a time become 4"),
        pytest.raises(ModelError, match=message),
    ):
        list(results)


def test_a_larger_request_later_on_gets_a_larger_batch(engine, monkeypatch):
    monkeypatch.setattr("flexmask.engine.engine.LOOKAHEAD_BATCHES", 1)
    monkeypatch.setattr("flexmask.engine.executor.CPU_AUTO_BATCH_SIZE", 1)
    results = run(engine, "mean", [REQUESTS[1], REQUESTS[0]], batch_size=None, max_new_tokens=2)
    assert results.stats.batch_size == 1
    assert [len(g.token_ids) for g in results] == [2, 2]
    assert results.stats.batch_size == 3


@pytest.mark.parametrize("fusion", OF_LOGITS, ids=str)
def test_what_one_group_cannot_have_does_not_reach_another(fusion):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    logits[3, 2] = -torch.inf
    fuse = LogitFusion(fusion, 3, 5, torch.device("cpu"))
    fuse.load([((0, 1, 2), (1.0, 0.5, 2.0)), ((3, 4), (1.0, 1.0))])
    first = fuse(logits)[:3]
    assert first.isfinite().all()
    logits[3:] = 0.0
    assert torch.equal(fuse(logits)[:3], first)


@pytest.mark.parametrize("fusion", OF_LOGITS, ids=str)
def test_only_the_proportions_of_weights_count(fusion):
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    fuse = LogitFusion(fusion, 3, 3, torch.device("cpu"))
    fuse.load([(range(3), (1.0, 0.5, 0.25))])
    scores = fuse(logits)
    for scale in (1e-60, 1e-300, 1e300):
        fuse.load([(range(3), (scale, 0.5 * scale, 0.25 * scale))])
        assert torch.equal(fuse(logits), scores)
