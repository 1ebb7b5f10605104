"""Every built-in strategy on a real model and real questions, against dense attention."""

import json
from pathlib import Path

import pytest

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
def reference(real_engine):
    return with_attention(real_engine.model, "flexmask_dense")


@pytest.mark.parametrize(
    "name",
    [name if name in USUAL else pytest.param(name, marks=pytest.mark.long) for name in BUILT_IN],
)
def test_a_strategy_equals_dense_attention_by_its_oracle(real_engine, reference, requests, name):
    strategy_class = load_registry().strategy(name)
    windows = {"window": SMALL_WINDOWS[name]} if name in SMALL_WINDOWS else {}
    strategy = strategy_class.from_parameters(windows)
    run = real_engine.generate(requests, strategy, max_new_tokens=NEW_TOKENS, batch_size=5)
    tokenize = RequestTokenizer(real_engine.tokenizer)
    for generation in run:
        layout = strategy.layout(tokenize(generation.request))
        logits = dense_logits(reference, strategy, layout, generation.token_ids)
        for row, token in zip(logits, generation.token_ids, strict=True):
            assert row[token] >= row.max() - NEAR
