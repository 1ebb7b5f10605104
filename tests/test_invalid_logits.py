"""Logits that are NaN or infinite: an error that names the request, and no other request's."""

import dataclasses

import pytest
import torch

from flexmask.engine import Engine
from flexmask.engine.sampler import NO_TOKEN, NOT_FINITE, most_likely
from flexmask.errors import ModelError, RequestError
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.results.dataset_run import DatasetRun
from flexmask.results.result_writer import ResultWriter, read_finished_rows
from flexmask.results.run_config import RunConfig
from flexmask.sampling import Sampling
from flexmask_strategies.causal import Causal
from oracles import make_model, random_words
from oracles import random_text_request as request

SPOILT = 50
ENDING = 2
"""Tokens whose embedding is NaN."""


def without_spoilt(text):
    return " ".join(word for word in text.split() if word != f"t{SPOILT}")


def clean(asked):
    segments = tuple(map(without_spoilt, asked.segments))
    return dataclasses.replace(asked, segments=segments, prefix=without_spoilt(asked.prefix))


def spoil(asked):
    return dataclasses.replace(asked, segments=(*asked.segments, f"t7 t{SPOILT} t8"))


CLEAN = [clean(request(seed, 1 + seed % 2, 5 + 3 * seed)) for seed in range(7)]
MIXED = [spoil(one) if number in (0, 3, 6) else one for number, one in enumerate(CLEAN)]
BAD = ["row0", "row3", "row6"]
FINITE = "the model's logits hold NaN or infinity; check its weights"


@pytest.fixture(scope="module")
def spoilt(tokenizer):
    model = make_model("llama", "flexmask")
    model.model.embed_tokens.weight[[SPOILT, ENDING]] = torch.nan
    return Engine(model, tokenizer)


def start(engine, requests=MIXED, strategy="causal", **options):
    return engine.generate(requests, strategy, **{"max_new_tokens": 4, "batch_size": 3} | options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "ensemble_isolation"},
        {"strategy": "ensemble_isolation", "batch_size": 1},
        {"fusion": "mean"},
        {"fusion": "max"},
        {"fusion": "vote"},
        {"sampling": Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=2)},
    ],
    ids=str,
)
def test_requests_with_invalid_logits_are_refused_and_no_others(engine, spoilt, options):
    expected = list(start(engine, [one for one in MIXED if one.uuid not in BAD], **options))
    refused = []
    kept = start(spoilt, on_refused=lambda *pair: refused.append(pair), **options)
    assert list(kept) == expected
    assert sorted(asked.uuid for asked, _ in refused) == BAD
    for asked, error in refused:
        assert f"request {asked.uuid!r}: token 1: {FINITE}" in str(error)
        assert "\n" not in str(error)
    assert kept.stats.generations == len(expected)


def test_under_each_only_the_prompt_with_invalid_logits_is_refused(spoilt):
    refused = []
    kept = list(start(spoilt, fusion="each", on_refused=lambda *pair: refused.append(pair)))
    assert sorted((asked.uuid, asked.segment) for asked, _ in refused) == [
        (one.uuid, len(one.segments)) for one in MIXED if one.uuid in BAD
    ]
    assert len(kept) == sum(len(one.segments) for one in MIXED) - len(BAD)


def test_without_anyone_to_refuse_to_it_raises_after_what_was_in_flight(engine, spoilt):
    kept: list[Generation] = []
    with pytest.raises(RequestError, match=f"request 'row6': token 1: {FINITE}"):
        for batch in start(spoilt, [*CLEAN[:6], MIXED[6]], batch_size=3).batches():
            kept += batch
    assert sorted(kept, key=lambda one: one.request.uuid) == list(start(engine, CLEAN[3:6:2]))
    with pytest.raises(RequestError, match=r"request 'row\d': token 1: "):
        list(start(spoilt))


def test_the_error_names_where_a_request_was_read_and_its_uuid(spoilt):
    asked = dataclasses.replace(MIXED[0], source="questions.jsonl:7")
    with pytest.raises(RequestError, match=r"questions.jsonl:7 \(request 'row0'\): token 1: "):
        list(start(spoilt, [asked]))


@pytest.mark.usefixtures("without_inductor")
def test_warming_up_a_model_with_invalid_logits_raises(spoilt):
    with pytest.raises(ModelError, match=f"cannot warm up, token 1: {FINITE}"):
        spoilt.warm_up(Causal(), prompt_tokens=SPOILT * 3 + 1, num_segments=SPOILT + 1)


@pytest.fixture
def change_logits(monkeypatch):
    """Changes the logits of an engine's steps; is told their number within the batch, from 0."""

    def change_logits(engine, change):
        decode, prefill = engine.runner.decode, engine.runner.prefill
        steps: list[torch.Tensor] = []

        def noted_prefill(plan):
            steps.clear()
            return prefill(plan)

        def changed_decode(token_ids):
            logits = decode(token_ids).clone()
            change(len(steps), logits)
            steps.append(token_ids)
            return logits

        monkeypatch.setattr(engine.runner, "prefill", noted_prefill)
        monkeypatch.setattr(engine.runner, "decode", changed_decode)

    return change_logits


def test_what_follows_the_end_of_a_row_does_not_matter(engine, spoilt, change_logits):
    """A row that has ended goes on with its last token, whose keys are NaN here."""

    def end_first_row(step, logits):
        if step == 1:
            logits[0, ENDING] = 1e4

    for each in (engine, spoilt):
        change_logits(each, end_first_row)
    expected, found = (list(start(each, CLEAN)) for each in (engine, spoilt))
    assert found == expected
    assert [one.finish_reason for one in found].count("eos") == 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=["", "hot"])
def test_a_single_invalid_logit_is_found_at_its_token(engine, change_logits, value, sampling):
    def change(step, logits):
        if step == 2:
            logits[1, 77] = value

    plain = list(start(engine, CLEAN[:3], sampling=sampling))
    change_logits(engine, change)
    refused = []
    run = start(
        engine, CLEAN[:3], sampling=sampling, on_refused=lambda *pair: refused.append(pair)
    )
    kept = list(run)
    ((asked, error),) = refused
    assert f"request {asked.uuid!r}: token 3: {FINITE}" in str(error)
    assert kept == [one for one in plain if one.request != asked]


def test_tokens_that_a_model_excludes_are_no_invalid_logits(engine, change_logits):
    plain = [one.token_ids for one in start(engine, CLEAN[:3])]
    excluded = plain[0][0]

    def exclude(step, logits):
        logits[:, excluded] = -torch.inf

    change_logits(engine, exclude)
    rows = [one.token_ids for one in start(engine, CLEAN[:3])]
    assert rows[0] != plain[0]
    assert all(excluded not in row for row in rows)


def test_a_row_of_which_nothing_is_left_says_so(engine, change_logits):
    change_logits(engine, lambda step, logits: logits.fill_(-torch.inf))
    with pytest.raises(RequestError, match="token 1: every token is excluded"):
        list(start(engine, CLEAN[:3]))


@pytest.mark.parametrize("vocab_size", [211, 256])
def test_the_most_likely_token_stands_for_itself_and_no_choice_for_its_reason(vocab_size):
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(1))
    logits[0, 3] = torch.nan
    logits[1, -1] = torch.inf
    logits[2] = -torch.inf
    logits[3, :-1] = -torch.inf
    logits[4, 5] = logits[4, 9] = 100.0
    tokens = most_likely(logits)[:, 0].tolist()
    assert tokens[:5] == [NOT_FINITE, NOT_FINITE, NO_TOKEN, vocab_size - 1, 5]
    assert tokens[5] == int(logits[5].argmax())


def test_a_spoilt_prompt_leaves_nothing_behind_for_a_shorter_one_in_its_row(engine, spoilt):
    long = Request((random_words(3, 60) + f" t{SPOILT} " + random_words(4, 9),), uuid="long")
    short = clean(Request((random_words(5, 20),), suffix=" t9", uuid="short"))
    refused = []
    options = {"strategy": "ensemble_isolation", "batch_size": 1}
    run = start(spoilt, [long, short], on_refused=lambda *pair: refused.append(pair), **options)
    assert list(run) == list(start(engine, [short], **options))
    assert [asked.uuid for asked, _ in refused] == ["long"]


def test_a_data_set_run_that_skips_records_the_row_and_goes_on(engine, spoilt, tmp_path):
    path = tmp_path / "rows.feather"
    config = RunConfig(run={"strategy": "causal"}, environment={})
    with ResultWriter.open(path, config=config, requests=MIXED, mode="new") as writer:
        options = {"max_new_tokens": 4, "batch_size": 3}
        run = DatasetRun.generating(spoilt, Causal(), writer, on_error="skip", **options)
        for _ in run.batches(lambda: False):
            pass
    rows = read_finished_rows(path).to_pylist()
    expected = {one.request.uuid: one.prediction for one in start(engine, CLEAN)}
    assert [row["uuid"] for row in rows] == [one.uuid for one in MIXED]
    for row in rows:
        if row["uuid"] in BAD:
            assert f"request {row['uuid']!r}: token 1: {FINITE}" in row["error"]
        else:
            assert (row["error"], row["prediction"]) == (None, expected[row["uuid"]])
