"""What a model's generation config asks for, against transformers' own `generate`."""

import copy
import dataclasses

import pytest
import torch
from transformers import GenerationConfig, WatermarkingConfig

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.generation_rules import GenerationRules
from flexmask.errors import FlexMaskWarning, ModelError, RequestError
from flexmask.sampling import Sampling
from flexmask_strategies.causal import Causal
from oracles import make_model
from oracles import random_text_request as request

REQUESTS = [request(seed, 1 + seed % 3, 5 + 3 * seed) for seed in range(7)]
STEPS = 12


@pytest.fixture(scope="module")
def dense():
    return make_model("llama", "sdpa")


@pytest.fixture
def configure(engine, monkeypatch):
    """Gives the engine's model another generation config."""

    def configure(**fields):
        config = GenerationConfig(**{"eos_token_id": 2, "pad_token_id": 0} | fields)
        monkeypatch.setattr(engine.model, "generation_config", config)
        return config

    return configure


def run(engine, requests=REQUESTS, **options):
    options = {"strategy": "causal", "max_new_tokens": STEPS, "batch_size": 3} | options
    return list(engine.generate(requests, **options))


def tokens_of(generations):
    return [generation.token_ids for generation in generations]


def prompts(engine, requests=REQUESTS):
    tokenize = RequestTokenizer(engine.tokenizer)
    return [list(Causal().layout(tokenize(asked)).token_ids) for asked in requests]


def by_transformers(dense, prompt, config):
    ids = torch.tensor([prompt])
    dense.generation_config = GenerationConfig(**config.to_diff_dict())
    output = dense.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False
    )
    return tuple(output[0, len(prompt) :].tolist())


def fields_by_name(plain):
    """Values that change something, given the tokens ``plain`` of each row without them."""
    first, often = plain[1][0], plain[0][1]
    pair = list(plain[2][3:5])
    return {
        "repetition_penalty": {"repetition_penalty": 1.5},
        "rewarded repetition": {"repetition_penalty": 0.8},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
        "suppress_tokens": {"suppress_tokens": [first, often]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [row[0] for row in plain]},
        "bad_words_ids": {"bad_words_ids": [pair, [often]]},
        "sequence_bias": {"sequence_bias": [[pair, -9.0], [[9], 1.5]]},
        "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": [2, first, often]},
        "min_length": {"min_length": 24, "eos_token_id": [2, first, often]},
        "forced_eos_token_id": {"forced_eos_token_id": 2},
        "length penalty": {"exponential_decay_length_penalty": [2, 1.7]},
        "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0)},
        "several": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 9},
        "from a model that samples": {"do_sample": True, "repetition_penalty": 1.2, "top_k": 3},
    }


@pytest.mark.parametrize("name", fields_by_name([range(9)] * 3))
def test_processors_choose_the_tokens_that_transformers_chooses(engine, dense, configure, name):
    plain = tokens_of(run(engine))
    fields = fields_by_name(plain)[name]
    without = {key: value for key, value in fields.items() if key == "eos_token_id"}
    configure(**without)
    unprocessed = tokens_of(run(engine))
    config = configure(**fields)
    found = tokens_of(run(engine))
    assert found == [by_transformers(dense, prompt, config) for prompt in prompts(engine)]
    assert found != unprocessed


def test_a_row_with_processors_does_not_depend_on_what_else_is_in_the_batch(engine, configure):
    configure(repetition_penalty=1.4, no_repeat_ngram_size=2)
    whole = run(engine, strategy="ensemble_isolation")
    for generation in whole:
        alone = run(engine, [generation.request], strategy="ensemble_isolation")
        assert alone == [generation]


def test_sampling_chooses_among_what_processors_leave(engine, configure):
    hot = Sampling(temperature=3.0, seed=5)
    sampled = {token for row in tokens_of(run(engine, sampling=hot)) for token in row}
    excluded = sorted(sampled - {2})[:40]
    configure(suppress_tokens=excluded)
    again = {token for row in tokens_of(run(engine, sampling=hot)) for token in row}
    assert again
    assert not again & set(excluded)


def test_how_a_model_would_sample_changes_nothing(engine, configure):
    plain = run(engine)
    configure(do_sample=True, temperature=3.0, top_k=2, top_p=0.3)
    assert run(engine) == plain


def test_processors_apply_to_the_logits_of_each_prompt_before_they_are_fused(
    engine, models, configure
):
    requests = [one for one in REQUESTS if len(one.segments) > 1]
    plain = tokens_of(run(engine, requests, fusion="mean", max_new_tokens=6))
    configure(repetition_penalty=1.5)
    found = tokens_of(run(engine, requests, fusion="mean", max_new_tokens=6))
    model = models("llama", "eager")
    for asked, tokens in zip(requests, found, strict=True):
        alone = prompts(engine, asked.alone())
        chosen: list[int] = []
        while len(chosen) < 6 and 2 not in chosen:
            rows = []
            for prompt in alone:
                ids = torch.tensor([prompt + chosen])
                logits = model(ids).logits[:, -1]
                seen = ids.unique()
                penalized = logits[:, seen]
                penalized = torch.where(penalized < 0, penalized * 1.5, penalized / 1.5)
                logits[:, seen] = penalized
                rows.append(logits[0])
            chosen.append(int(torch.stack(rows).mean(0).argmax()))
        assert tokens == tuple(chosen)
    assert found != plain


def test_a_config_that_asks_for_nothing_makes_no_processors(engine, configure, monkeypatch):
    def must_not_be_made(*args):
        raise AssertionError("processors for nothing")

    monkeypatch.setattr("flexmask.engine.executor.BatchProcessors", must_not_be_made)
    configure(repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0, temperature=0.6)
    assert len(run(engine)) == len(REQUESTS)


def test_a_config_that_excludes_every_token_is_an_error_that_names_the_request(engine, configure):
    configure(suppress_tokens=list(range(211)))
    with pytest.raises(RequestError, match=r"request 'row\d': token 1: every token is excluded"):
        run(engine)


def test_invalid_values_are_removed_where_the_config_says_so(engine, configure, monkeypatch):
    decode = engine.runner.decode

    def decode_to_nan(token_ids):
        logits = decode(token_ids)
        logits[:, :3] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "decode", decode_to_nan)
    configure(remove_invalid_values=True)
    removed = tokens_of(run(engine, REQUESTS[:3]))
    assert all(len(row) == STEPS for row in removed)
    configure(repetition_penalty=1.2, suppress_tokens=[0, 1, 2])  # which hides the NaN
    with pytest.raises(RequestError, match="logits hold NaN or infinity"):
        run(engine, REQUESTS[:3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repetition_penalty": -1.0}, "strictly positive float, but is -1.0; correct its"),
        ({"repetition_penalty": 2}, "strictly positive float, but is 2"),
        ({"no_repeat_ngram_size": 1.5}, "strictly positive integer, but is 1.5"),
        ({"bad_words_ids": []}, "non-empty list"),
        ({"bad_words_ids": [[500]]}, "vocabulary size is 211"),
        ({"suppress_tokens": 7}, "cannot be applied"),
        ({"min_length": "long"}, "cannot be applied"),
        ({"forced_eos_token_id": 999}, "cannot be applied"),
        ({"num_beams": 4}, r"beam search \(num_beams=4\).*set its num_beams to 1"),
        ({"guidance_scale": 1.5}, "guidance by a second"),
        ({"penalty_alpha": 0.6}, "contrastive search"),
        ({"force_words_ids": [[5]]}, "constrained beam search"),
        ({"dola_layers": "high"}, "DoLa"),
        ({"token_healing": True}, "token healing"),
        ({"stop_strings": [""]}, "stop_strings .* must be texts"),
        ({"eos_token_id": "</s>"}, "must be a token id or a list of them, got '</s>'"),
        ({"eos_token_id": [2, 3.5]}, "must be a token id or a list of them"),
    ],
    ids=str,
)
def test_what_cannot_be_applied_is_refused_in_one_line(engine, configure, fields, message):
    config = configure()
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ModelError, match=message) as caught:
        run(engine)
    assert "\n" not in str(caught.value)


def test_a_field_in_the_wrong_config_is_refused_as_transformers_does(engine, monkeypatch):
    monkeypatch.setattr(engine.model.config, "repetition_penalty", 1.4, raising=False)
    with pytest.raises(
        ModelError, match=r"set model.generation_config.repetition_penalty instead"
    ):
        run(engine)


def test_stop_strings_of_the_config_end_rows_too(engine, configure):
    plain = run(engine)
    word = plain[3].text.split()[4]
    configure(stop_strings=f" {word} ")
    assert run(engine)[3] == run(engine, stop=[f" {word} "])[3]
    assert run(engine)[3].finish_reason == "stop"


@pytest.mark.parametrize("as_config", [list, tuple, torch.tensor])
def test_each_of_several_tokens_ends_a_row(engine, configure, as_config):
    ending = run(engine)[2].token_ids[1]
    configure(eos_token_id=as_config([2, ending]))
    ended = run(engine)[2]
    assert ended.finish_reason == "eos"
    assert ended.token_ids[-1] == ending


def test_an_empty_list_ends_no_row(engine, configure):
    ending = run(engine)[2].token_ids[1]
    configure(eos_token_id=[])
    assert {one.finish_reason for one in run(engine)} == {"length"}
    configure(eos_token_id=None)
    assert GenerationRules.of(engine.model, engine.tokenizer).eos_token_ids == {2}
    assert ending != 2


@pytest.mark.parametrize("unknown", [-1, 211])
def test_an_ending_that_is_no_token_is_warned_of(engine, configure, unknown):
    configure(eos_token_id=[unknown])
    with pytest.warns(FlexMaskWarning, match=f"eos_token_id {unknown} is none of .* 211 tokens"):
        rows = run(engine)
    assert {one.finish_reason for one in rows} == {"length"}


def test_without_any_ending_rows_have_their_full_length(engine, configure, monkeypatch):
    configure(eos_token_id=None)
    tokenizer = copy.deepcopy(engine.tokenizer)
    tokenizer.eos_token = None
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    assert {len(row) for row in tokens_of(run(engine))} == {STEPS}
    monkeypatch.setattr(engine.model, "generation_config", None)
    assert {len(row) for row in tokens_of(run(engine))} == {STEPS}


def test_the_rules_are_those_of_the_time_when_a_run_starts(engine, configure):
    configure(no_repeat_ngram_size=1)
    begun = engine.generate(REQUESTS, "causal", max_new_tokens=STEPS, batch_size=3)
    want = run(engine)
    configure()
    assert list(begun) == want != run(engine)


def test_warming_up_takes_a_config_with_processors(engine, configure):
    configure(repetition_penalty=1.3)
    stats = engine.warm_up(Causal(), prompt_tokens=40, max_new_tokens=4, batch_size=3)
    assert (stats.generations, stats.prompt_tokens) == (3, 3 * 36)
    again = dataclasses.replace(REQUESTS[0], uuid="again")
    results = engine.generate([again] * 3, Causal(), max_new_tokens=4, batch_size=3)
    assert len(list(results)) == 3
    assert results.stats.compilations == 0
