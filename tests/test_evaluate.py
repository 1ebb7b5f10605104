"""How right result files are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmask.errors import OptionError, OutputError
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.results.evaluation import compare, estimate_mean, evaluate
from flexmask.results.result_writer import ResultWriter
from flexmask.results.run_config import RunConfig
from flexmask.tasks.judge import Judge
from flexmask.tasks.matching import is_lemma_match, token_f1
from flexmask.tasks.request_source import BadRow


@pytest.mark.parametrize(
    ("prediction", "answers", "f1"),
    [
        ("the Big Smoke", ["Big Smoke"], 1.0),
        ("Big Smoke town", ["Big Smoke", "London"], 0.8),
        ("a b b c", ["b b"], 4 / 5),  # "a" is an article
        ("b", ["b b"], 2 / 3),
        ("Paris", ["London"], 0.0),
        ("", ["London"], 0.0),
        ("Paris", [], 0.0),
    ],
)
def test_token_f1_is_that_of_squad(prediction: str, answers: list[str], f1: float) -> None:
    assert token_f1(prediction, answers) == pytest.approx(f1)


def test_lemmas_match_word_by_word() -> None:
    pytest.importorskip("simplemma")
    assert is_lemma_match("Rivers", ["the river"])
    assert is_lemma_match("walked dogs", ["walk dog"])
    assert not is_lemma_match("river bank", ["river"])
    assert not is_lemma_match("", [""])
    assert is_lemma_match("U.S.", ["US"])
    assert is_lemma_match("Häuser", ["Haus"], "de")


def test_a_language_without_lemmas_is_refused_before_a_row() -> None:
    pytest.importorskip("simplemma")
    Judge(metric="exact", language="xx").check()
    with pytest.raises(OptionError, match="no lemmas of the language 'xx'"):
        Judge(metric="lemma", language="xx").check()


@pytest.mark.parametrize(
    ("judge", "prediction", "score"),
    [
        (Judge(), "The rivers", 0.0),
        (Judge(metric="f1"), "The rivers here", 0.0),
        (Judge(metric="f1"), "a river here", 2 / 3),
        (Judge(metric="lemma"), "The rivers", 1.0),
    ],
)
def test_the_metric_makes_the_score(judge: Judge, prediction: str, score: float) -> None:
    pytest.importorskip("simplemma")
    assert judge.score(prediction, ["river"]) == pytest.approx(score)


def test_an_answer_is_the_first_line_or_all() -> None:
    generation = Generation(Request(("q",)), "\n  One. \nQ: two\n", (), "eos", 1)
    assert Judge().prediction(generation) == "One."
    assert Judge(cut="all").prediction(generation) == "One. \nQ: two"
    with pytest.raises(OptionError, match="cut must be one of first line, all, got 'word'"):
        Judge(cut="word")


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=50))
def test_the_interval_holds_the_mean(scores: list[float]) -> None:
    estimate = estimate_mean(scores)
    assert estimate.mean == pytest.approx(np.mean(scores))
    assert 0 <= estimate.low <= estimate.mean + 1e-12
    assert estimate.mean - 1e-12 <= estimate.high <= 1
    assert estimate == estimate_mean(scores[::-1])


def test_the_interval_is_that_of_resampling_the_questions() -> None:
    scores = np.random.default_rng(1).choice([0, 0.3, 1], size=200)
    resampled = np.random.default_rng(2).choice(scores, size=(10_000, 200)).mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    estimate = estimate_mean(scores.tolist())
    assert estimate.low == pytest.approx(low, abs=0.01)
    assert estimate.high == pytest.approx(high, abs=0.01)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        estimate = estimate_mean(generator.binomial(1, 0.7, size=300).tolist())
        hits += estimate.low <= 0.7 <= estimate.high
    assert 0.90 <= hits / 200 <= 0.99


REQUESTS = [
    Request(uuid=f"q{n}", segments=(f"{n}?",), answers=(str(n),) if n < 8 else ())
    for n in range(10)
]


def write(
    path: Path, right: Sequence[int], requests: Sequence[Request] = REQUESTS, failed: int = -1
) -> Path:
    """A result file that is right about some questions."""
    config = RunConfig({"right": list(right)})
    with ResultWriter.open(path, config=config, requests=requests) as writer:
        for number, request in enumerate(requests):
            text = str(number) if number in right else "no"
            result = Generation(request, text, (1,), "eos", 1)
            writer.write([BadRow(request.uuid, "e", request) if number == failed else result])
    return path


def test_a_result_file_is_judged(tmp_path: Path) -> None:
    evaluation = evaluate(write(tmp_path / "a.feather", [0, 1, 5, 9], failed=5), ["exact", "f1"])
    assert (evaluation.rows, evaluation.failed, len(evaluation.answers)) == (10, 1, 8)
    assert evaluation.scores["exact"] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert evaluation.estimates["f1"].mean == 2 / 8


def test_files_of_the_same_questions_are_compared_in_pairs(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a.feather", [0, 1, 2]),
        write(tmp_path / "b.parquet", [0, 1, 2, 3, 4, 5]),
        write(tmp_path / "c.jsonl", [0, 1, 2][::-1]),
    ]
    same, *others = compare([evaluate(path, ["exact"]) for path in paths])
    assert (same.first, same.second, same.metric) == (paths[0], paths[1], "exact")
    assert (same.first_better, same.second_better) == (0, 3)
    assert same.difference.mean == 3 / 8
    assert 0 <= same.difference.low <= 3 / 8 <= same.difference.high <= 1
    equal, back = others
    assert (equal.difference.low, equal.difference.high) == (0, 0)
    assert (back.first_better, back.difference.mean) == (3, -3 / 8)


def test_a_pair_is_a_question_wherever_it_stands(tmp_path: Path) -> None:
    first = evaluate(write(tmp_path / "a.feather", [0]), ["exact"])
    turned = write(tmp_path / "b.feather", [9], REQUESTS[::-1])  # the row of q0
    second = evaluate(turned, ["exact"])
    (comparison,) = compare([first, second])
    assert (comparison.first_better, comparison.second_better) == (1, 0)
    assert second.estimates["exact"].mean == 0


def test_rows_of_single_prompts_are_averaged_for_each_question(tmp_path: Path) -> None:
    whole = Request(uuid="a", segments=("1", "2", "3"), answers=("x",))
    requests = [*whole.alone(), *replace(whole, uuid="b", segments=("1",)).alone()]
    with ResultWriter.open(
        tmp_path / "each.feather", config=RunConfig({}), requests=requests
    ) as writer:
        for request, text in zip(requests, "xoxo", strict=True):
            writer.write([Generation(request, text, (1,), "eos", 1)])
    each = evaluate(tmp_path / "each.feather", ["exact"])
    assert (each.rows, each.answers) == (4, {"a": ("x",), "b": ("x",)})
    assert each.scores["exact"] == [2 / 3, 0.0]
    assert each.estimates["exact"].mean == 1 / 3
    both = [whole, replace(whole, uuid="b")]
    with ResultWriter.open(
        tmp_path / "one.feather", config=RunConfig({}), requests=both
    ) as writer:
        writer.write([Generation(request, "x", (1,), "eos", 1) for request in both])
    (comparison,) = compare([each, evaluate(tmp_path / "one.feather", ["exact"])])
    assert comparison.difference.mean == pytest.approx(2 / 3)
    assert (comparison.first_better, comparison.second_better) == (0, 2)


def test_files_of_other_questions_are_not_compared(tmp_path: Path) -> None:
    other = Request(uuid="q1", segments=("1?",), answers=("eins",))
    paths = [
        write(tmp_path / "a.feather", []),
        write(tmp_path / "b.feather", [], [REQUESTS[0], other, *REQUESTS[3:]]),
    ]
    with pytest.raises(OutputError) as raised:
        compare([evaluate(path, ["exact"]) for path in paths])
    assert str(raised.value) == (
        f"{paths[1]}: not the questions of {paths[0]}: 1 only in {paths[0]} (uuid 'q2'); "
        "1 with other answers (uuid 'q1'); only runs over the same questions can be compared"
    )


def test_a_file_without_answers_cannot_be_judged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.feather", [], REQUESTS[8:])
    with pytest.raises(OutputError, match="none of its rows has accepted answers"):
        evaluate(path, ["exact"])
    with pytest.raises(ValueError, match="at least one score"):
        estimate_mean([])
    assert not math.isnan(estimate_mean([1.0]).low)
