"""``benchmarks/document_reuse.py`` at tiny size; how often documents are found is predicted."""

from __future__ import annotations

import json
import math
import random
import sys
from typing import Any

import pytest

import document_reuse
from cache_prediction import predicted_hit_rate
from document_questions import EXPONENT
from oracles import random_words
from vllm_stand_in import make_site

DOCUMENTS = 10


@pytest.fixture
def questions(tmp_path):
    """Sixty questions with 3 of ten documents, popular ones more often."""
    texts = [f"Document {n:03}: {random_words(n, 12)}\n\n" for n in range(1, DOCUMENTS + 1)]
    draw = random.Random(0)
    weights = [(rank + 1) ** -EXPONENT for rank in range(DOCUMENTS)]
    path = tmp_path / "questions.jsonl"
    with path.open("w") as file:
        for number in range(60):
            drawn: dict[str, None] = {}
            while len(drawn) < 3:
                drawn.setdefault(draw.choices(texts, weights)[0])
            row = {"uuid": str(number), "prefix": "Read. ", "segments": [*drawn], "suffix": "A:"}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def measured(questions, tmp_path, monkeypatch, without_inductor):
    """Runs the program; gives its record."""

    def run(*arguments):
        record = tmp_path / "record.json"
        command = "document_reuse --shape tiny --device cpu --limit 4 --batch-size 2"
        command += f" --max-new-tokens 2 --requests {questions} --record {record}"
        monkeypatch.setattr(sys, "argv", [*command.split(), *map(str, arguments)])
        monkeypatch.setattr(document_reuse, "SINGLE", 2)
        document_reuse.main()
        return json.loads(record.read_text())

    return run


def test_a_cache_of_half_the_corpus_is_hit_as_popularity_predicts(measured, capsys):
    record = measured("--ways", "half, all questions")
    (outcome,) = record["outcomes"]
    assert (record["requests"], record["all_requests"], record["documents"]) == (4, 60, DOCUMENTS)
    assert outcome["hit_rate"] == pytest.approx(outcome["predicted_hit_rate"], abs=0.1)
    assert 0.3 < outcome["hit_rate"] < 1
    assert outcome["evictions"] > 0
    assert len(outcome["memory"]) == 10
    printed = capsys.readouterr().out
    assert "vLLM: not run; --vllm-site names a folder with its packages" in printed
    assert record["vllm"] is None
    assert f"documents found: {outcome['hit_rate']:.1%}, predicted" in printed
    assert "GiB on the host after each tenth: " in printed


def test_vllm_runs_the_same_prompts_before(measured, tmp_path, capsys):
    site = make_site(tmp_path / "site")
    record = measured("--vllm-site", site, "--ways", "no cache")
    assert record["vllm"]["environment"]["vllm"] == "0.1"
    assert record["vllm"]["failure"] is None
    (outcome,) = record["outcomes"]
    tokens = outcome["computed_tokens"] + outcome["copied_tokens"]
    peer_tokens = record["vllm"]["computed_tokens"] + record["vllm"]["cached_tokens"]
    assert peer_tokens == tokens + 4  # decoding computes the last token of each prompt
    vllm, flexmask = (
        line for line in capsys.readouterr().out.splitlines() if line[:4] in ("vLLM", "no c")
    )
    assert len(vllm.split()) == 5
    assert flexmask.startswith("no cache")
    broken = measured("--vllm-site", make_site(tmp_path / "other", "start"), "--ways", "no cache")
    assert "no memory left" in broken["vllm"]["failure"]
    assert "vLLM: exit status 1: AssertionError: no memory left" in capsys.readouterr().out


def approximated_by_che(count: int, capacity: int) -> float:
    """The hit rate of single draws by the approximation of Che, Tung and Wang (2002)."""
    weights = [(rank + 1) ** -EXPONENT for rank in range(count)]
    chances = [weight / sum(weights) for weight in weights]
    low, high = 0.0, 1e9
    for _ in range(200):
        time = (low + high) / 2
        if sum(1 - math.exp(-chance * time) for chance in chances) < capacity:
            low = time
        else:
            high = time
    return math.fsum(chance * (1 - math.exp(-chance * low)) for chance in chances)


@pytest.mark.parametrize("capacity", [20, 50, 100])
def test_the_prediction_for_single_draws_is_that_of_che(capacity):
    found = predicted_hit_rate(
        [1] * 200, capacity, exponent=EXPONENT, questions=40_000, per_question=1, together=1
    )
    assert found == pytest.approx(approximated_by_che(200, capacity), abs=0.015)


def test_questions_that_start_together_ask_once_and_nothing_too_large_is_kept():
    everything: dict[str, Any] = {
        "exponent": EXPONENT,
        "per_question": 3,
        "together": 50,
        "questions": 200,
    }
    assert predicted_hit_rate([1] * 5, 5, **everything) == 0.75  # all but the first batch
    assert predicted_hit_rate([6] * 5, 5, **everything) == 0
