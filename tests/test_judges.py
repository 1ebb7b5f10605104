"""Judges that extract answers, and judges of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from command import run_command
from flexmask.errors import JudgeError, OptionError, TaskError
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.results.result_writer import ResultWriter, read_finished_rows
from flexmask.results.run_config import RunConfig
from flexmask.tasks.judge import Judge
from flexmask.tasks.matching import contains_answer
from flexmask.tasks.task import load_task

FUNCTION = """
def near(prediction, answers):
    return max(len(set(prediction) & set(answer)) / len(set(answer)) for answer in answers)

def fails(prediction, answers):
    return {}[prediction]

def text(prediction, answers):
    return "good"
"""


@pytest.mark.parametrize(
    ("prediction", "answer", "is_right"),
    [
        ("It is the city of Paris.", "Paris", True),
        ("A Parisian.", "Paris", False),
        ("In 2011", "11", False),
        ("the Big  Smoke!", "big smoke", True),
        ("答えは東京です", "東京", True),
        ("C++ it is", "c", True),
        ("anything", "", False),
    ],
)
def test_contains_finds_whole_words(prediction: str, answer: str, is_right: bool) -> None:
    assert contains_answer(prediction, [answer]) is is_right


@pytest.mark.parametrize(
    ("metric", "text", "answer"),
    [
        (r"regex:answer is (\w+)", "The answer is Paris, the answer is Rome", "Paris"),
        (r"regex:\d{4}", "between 1914 and 1918", "1914"),
        ("regex:a: (.*)|b: (.*)", "b: here", "here"),
        ("regex:answer is (.*)", "I do not know", ""),
        ("choice", "The answer is B.", "B"),
        ("choice", "(b)", "B"),
        ("choice", "b", "B"),
        ("choice", "It is because E", ""),
        ("choice:ABCDE", "It is because E", "E"),
        ("choice", "e.g. c: this", "C"),
        ("choice", "答案是D", "D"),
        ("choice", "I'd say A's cousin, D", "D"),
        ("number", "It has 1,234.50 m, or -3e2 or so", "-3e2"),
        ("number", "5-10 H2O", "10"),
        ("number", "9" * 400, ""),
        ("contains", "as it is ", "as it is"),
    ],
)
def test_the_answer_is_found_in_the_text(metric: str, text: str, answer: str) -> None:
    judge = Judge(metric=metric)
    assert judge.answer_in(text) == answer
    assert Judge("all", metric).answer_in(f"\n{text}\n") == answer


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "score"),
    [
        ("regex:is (.*)", "the Paris!", ["Paris"], 1),
        ("choice", "B", ["(b)", "C"], 1),
        ("choice", "", ["B"], 0),
        ("number", "0.30", ["0.3"], 1),
        ("number", "1,000", ["1000.1", "1e3"], 1),
        ("number", "", ["3"], 0),
        ("number:0.1", "3.1", ["3.2"], 1),
        ("number:0.1", "3.1", ["3.21"], 0),
        ("number:1%", "\N{MINUS SIGN}99", ["-100"], 1),
        ("number:1%", "98.9", ["100"], 0),
    ],
)
def test_an_extracted_answer_is_scored(
    metric: str, prediction: str, answers: list[str], score: float
) -> None:
    assert Judge(metric=metric).score(prediction, answers) == score


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("bleu", "`judge` must be one of exact, f1, lemma, contains, regex:PATTERN, choice, "),
        ("contians", "did you mean 'contains'"),
        ("regex:(", r"`judge` has an invalid pattern '\(': missing \) at position 1"),
        ("regex:", "it is empty"),
        ("choice:AA", "takes two or more letters, as in choice:ABCDE, got 'choice:AA'"),
        ("number:-1", "takes a tolerance of 0 or more, as in number:0.01 or number:1%, got"),
        ("number:near", "takes a tolerance"),
    ],
)
def test_a_judge_that_is_none_is_refused(metric: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Judge(metric=metric)


def test_a_pattern_that_takes_too_long_is_given_up() -> None:
    generation = Generation(Request(("q",), uuid="q7"), "a" * 40 + "b", (), "eos", 1)
    with pytest.raises(JudgeError, match=r"^request .q7.: the pattern .* takes more than 1 s"):
        Judge(metric="regex:(a|a)*$").prediction(generation)


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A result file of generated texts, each with an accepted answer; judged by exact match."""
    monkeypatch.chdir(tmp_path)

    def write(texts: list[tuple[str, str]], judge: Judge = Judge()) -> Path:
        path = tmp_path / "a.feather"
        requests = [
            Request((f"{n}?",), uuid=f"q{n}", answers=(answer,))
            for n, (_, answer) in enumerate(texts, start=1)
        ]
        config = RunConfig({"judge": judge.record()})
        with ResultWriter.open(path, config=config, requests=requests, judge=judge) as writer:
            for request, (text, _) in zip(requests, texts, strict=True):
                writer.write([Generation(request, text, (1,), "eos", 1)])
        return path

    return write


def test_a_finished_file_is_judged_by_other_judges(finished: Callable[..., Path]) -> None:
    path = finished([("I think.\nSo: (b)", "B"), ("A or C", "A"), ("C", "C"), ("none", "D")])
    Path("scores.py").write_text(FUNCTION)
    options = ["--judge", "choice", "--judge", "contains", "--judge", "scores.py:near", "--json"]
    (file,) = json.loads(run_command("eval", path, *options).out)["files"]
    means = {name: metric["mean"] for name, metric in file["metrics"].items()}
    assert means == {"choice": 0.5, "contains": 0.25, "scores.py:near": 0.5}
    (file,) = json.loads(run_command("eval", path, *options, "--cut", "all").out)["files"]
    assert file["metrics"]["choice"]["mean"] == 0.75


def test_a_run_writes_the_extracted_answer_and_its_score(finished: Callable[..., Path]) -> None:
    judge = Judge("all", "choice")
    path = finished([("I think.\nSo: (b)", "(B)"), ("A or C", "C")], judge)
    rows = read_finished_rows(path).to_pydict()
    assert (rows["prediction"], rows["correct"], rows["score"]) == (
        ["B", "A"], [True, False], [1, 0]
    )  # fmt: skip
    (file,) = json.loads(run_command("eval", path, "--judge", "choice", "--json").out)["files"]
    assert file["metrics"]["choice"]["mean"] == 0.5  # cut as the run did


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("choice", "a.feather: row 2, uuid 'q2': choice needs accepted answers that are one of"),
        ("number", "a.feather: row 1, uuid 'q1': number needs accepted answers that are numbers,"),
        ("scores.py:fails", "row 1, uuid 'q1': scores.py:fails failed: KeyError: 'B' at "
         "scores.py:6: `return {}[prediction]`"),
        ("scores.py:text", "scores.py:text must return a number from 0 to 1, got 'good'"),
        ("scores.py:nothing", "scores.py has no function 'nothing'; define nothing(prediction"),
        ("nowhere.py:near", "nowhere.py: No such file or directory; name a judge's file.py:name"),
        ("broken.py:near", "broken.py failed: NameError: name 'x' is not defined at broken.py:1"),
        ("regex:(", "--judge has an invalid pattern '('"),
    ],
)  # fmt: skip
def test_a_judge_that_cannot_apply_is_one_line(
    finished: Callable[..., Path], judge: str, message: str
) -> None:
    path = finished([("B", "B"), ("A", "London")])
    Path("scores.py").write_text(FUNCTION)
    Path("broken.py").write_text("x")
    assert message in run_command("eval", path, "--judge", judge).error


TASK = """
[paraphrases.groups]
q = "q"
[prompt]
segment = "{{ q }}"
[answer]
cut = "all"
judge = 'regex:answer is (\\w+)'
"""


def test_a_task_names_its_judge_but_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TASK)
    assert load_task(str(path)).judge == Judge("all", r"regex:answer is (\w+)")
    path.write_text(TASK.replace("'regex:answer is (\\w+)'", "'scores.py:near'"))
    with pytest.raises(TaskError, match=r"answer\.judge cannot be a Python function"):
        load_task(str(path))


def test_answers_are_checked_for_the_judge_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(
        '{"segments": ["1?"], "answers": ["1"]}\n{"segments": ["2?"], "answers": ["two"]}\n'
    )
    options = ["generate", "-i", "rows.jsonl", "--judge", "number:1%", "--dry-run"]
    error = run_command(*options).error
    assert error.endswith(
        "rows.jsonl:2: number needs accepted answers that are numbers, got 'two'"
    )
    skipped = run_command(*options, "--on-error", "skip")
    assert "failed: rows.jsonl:2: number needs accepted answers" in skipped.out


def test_a_function_is_recorded_with_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scores.py").write_text(FUNCTION)
    before = Judge(metric="scores.py:near").record()
    Path("scores.py").write_text(FUNCTION + "\n")
    after = Judge(metric="scores.py:near").record()
    assert before["metric"].startswith("scores.py:near (sha256 ")
    assert before != after
    assert Judge(metric="f1").record() == {"cut": "first line", "metric": "f1", "language": "en"}
