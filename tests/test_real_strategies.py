"""Every built-in strategy on a real model and real questions, against dense attention."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.plugins.registry import load_registry
from flexmask.request import Request
from real_model import dense_logits, with_attention

pytestmark = pytest.mark.real

DATA = Path(__file__).parents[2] / "shared" / "data"
NEW_TOKENS = 4
NEAR = 1e-3
"""Logits so close may be told apart otherwise in another order of additions."""

BUILT_IN = sorted(
    registered.cls.name
    for registered in load_registry().strategies()
    if registered.owner.distribution == "flexmask"
)
USUAL = {"adaptive_parallel", "ensemble_isolation", "sliding_window"}
"""One of each way to compute: scores of a part scaled, all slots read in decode, and only some."""

SMALL_WINDOWS = {"dilated": 64, "global_window": 64, "sliding_window": 64}


@pytest.fixture(scope="module")
def requests():
    """Five questions of MyriadLAMA with three paraphrases each, and the prefix used with them."""
    if not DATA.is_dir():
        pytest.skip(f"needs {DATA}")
    prefix = (DATA / "myriadlama_prefix.txt").read_text()
    with (DATA / "myriadlama_1000.jsonl").open() as file:
        rows = [json.loads(next(file)) for _ in range(5)]
    return [
        Request(
            segments=tuple(f"Q: {text}" for text in row["manual_paraphrases"][:3]),
            prefix=prefix,
            suffix="\nA:",
            uuid=row["uuid"],
        )
        for row in rows
    ]


@pytest.fixture(scope="module")
def with_choices(requests):
    """The same questions with four choices each, of one to several tokens."""
    choices = (" France", " the Kingdom of Denmark", " a", " Christianity and Judaism")
    return [replace(request, choices=choices) for request in requests[:2]]


@pytest.fixture(scope="module")
def reference(real_engine):
    return with_attention(real_engine.model, "flexmask_dense")


def each_strategy(usual):
    """Parametrize a test by the built-in strategies; others than the usual ones take long."""
    long = pytest.mark.long
    names = [name if name in usual else pytest.param(name, marks=long) for name in BUILT_IN]
    return pytest.mark.parametrize("name", names)


def strategy_named(name):
    windows = {"window": SMALL_WINDOWS[name]} if name in SMALL_WINDOWS else {}
    return load_registry().strategy(name).from_parameters(windows)


@each_strategy(USUAL)
def test_a_strategy_equals_dense_attention_by_its_oracle(real_engine, reference, requests, name):
    strategy = strategy_named(name)
    run = real_engine.generate(requests, strategy, max_new_tokens=NEW_TOKENS, batch_size=5)
    tokenize = RequestTokenizer(real_engine.tokenizer)
    for generation in run:
        layout = strategy.layout(tokenize(generation.request))
        logits = dense_logits(reference, strategy, layout, generation.token_ids)
        for row, token in zip(logits, generation.token_ids, strict=True):
            assert row[token] >= row.max() - NEAR


@each_strategy({"ensemble_isolation"})
def test_choices_score_as_a_dense_pass_for_each(real_engine, reference, with_choices, name):
    strategy = strategy_named(name)
    tokenize = RequestTokenizer(real_engine.tokenizer)
    for score in real_engine.score(with_choices, strategy, batch_size=2):
        layout = strategy.layout(tokenize(score.request))
        for choice in score.choices:
            logits = dense_logits(reference, strategy, layout, choice.token_ids)
            expected = logits.log_softmax(-1)[range(len(logits)), choice.token_ids]
            found = torch.tensor(choice.token_logprobs)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
