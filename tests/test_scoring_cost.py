"""``benchmarks/scoring_cost.py`` at tiny size, beside dense passes and a stand-in for vLLM."""

from __future__ import annotations

import json
import sys

import pytest

import scoring_cost
from flexmask import RequestTokenizer, read_requests
from flexmask.demo import model_path
from flexmask.encoding.tokenization import load_tokenizer
from scoring_peers import passes
from vllm_stand_in import make_site

ROWS = 8


@pytest.fixture
def questions(tmp_path):
    """Questions behind one prefix, with choices of different lengths."""
    rows = [
        {
            "uuid": str(number),
            "prefix": "Q: Who was the first?\nA: Ada\n\n" * 5,
            "segments": [f"Q: Who was number {number}?", "not used"],
            "suffix": "\nA:",
            "choices": [" Ada", " Bob the builder", f" {number}", " no one of these"],
            "answer": number % 4,
        }
        for number in range(ROWS)
    ]
    path = tmp_path / "choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def measured(questions, tmp_path, monkeypatch, without_inductor):
    """Runs the program; gives its outcomes by case and side."""

    def run(*arguments):
        record = tmp_path / "record.json"
        command = "scoring_cost --shape tiny --questions 4 --batch-size 4 --repeats 1"
        command += f" --requests {questions} --record {record}"
        monkeypatch.setattr(sys, "argv", [*command.split(), *map(str, arguments)])
        scoring_cost.main()
        found = json.loads(record.read_text())
        assert (found["requests"], found["choices"]) == (4, 16)
        return {(one["case"], one["side"]): one for one in found["outcomes"]}

    return run


def test_a_pass_for_each_choice_gives_the_same_scores_and_computes_more(
    measured, questions, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(scoring_cost, "find_spec", lambda _: None)
    outcomes = measured("--vllm-site", make_site(tmp_path / "site"))
    assert [*outcomes] == [
        (case, side) for case in ("shared", "own") for side in ("flexmask", "transformers", "vLLM")
    ]
    requests = read_requests(str(questions), num_segments=1, limit=4, with_choices=True)
    tokenize = RequestTokenizer(load_tokenizer(str(model_path())))
    rows = [
        len(prompt) + len(choice) - 1
        for request in requests
        for prompt, choice in passes(tokenize, scoring_cost.as_one_segment(request))
    ]
    own, dense = outcomes["shared", "flexmask"], outcomes["shared", "transformers"]
    assert sum(rows) <= dense["computed_tokens"] <= 4 * 4 * max(rows)
    assert own["computed_tokens"] < dense["computed_tokens"] / 3
    assert dense["largest_difference"] < 1e-4
    assert outcomes["own", "transformers"]["largest_difference"] < 1e-4
    assert "transformers" in capsys.readouterr().out


def test_the_harness_gives_the_same_scores(measured):
    pytest.importorskip("lm_eval", reason="needs lm-eval 0.4.13")
    pytest.importorskip("accelerate", reason="the harness's model hf needs it")
    outcomes = measured("--cases", "own")
    assert outcomes["own", "lm_eval hf"]["largest_difference"] < 1e-4


def test_vllm_takes_random_weights_only(questions, monkeypatch, capsys):
    command = f"scoring_cost --requests {questions} --model x --vllm-site {questions.parent}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit):
        scoring_cost.main()
    assert "vLLM runs random weights: name a --shape" in capsys.readouterr().err
