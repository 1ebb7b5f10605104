"""``flexmask score`` as a user runs it, on the bundled model."""

import json
from itertools import combinations
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from command import run_command
from flexmask.demo import model_path
from flexmask.engine import Engine
from flexmask.results.result_writer import read_finished_rows, read_run_config
from page_data import data_of

ROWS: list[dict[str, Any]] = [
    {
        "uuid": "ada",
        "segments": ["Q: Where was Ada born?", "Q: What is the place of Ada's birth?"],
        "suffix": "\nA:",
        "choices": [" London", " a town by the sea", " 9"],
        "answer": "London",
    },
    {
        "uuid": "tie",
        "segments": ["Q: Who wrote it?", "Q: Who is the author of it?"],
        "suffix": "\nA:",
        "choices": [" Bob", " Alice", " Bob"],
        "answer": 2,
    },
    {"uuid": "open", "segments": ["Q: Why?"], "suffix": "\nA:", "choices": [" so", " no"]},
]


@pytest.fixture(scope="module")
def bundled():
    """The bundled model, loaded once for all commands of these tests."""
    return Engine.from_pretrained(str(model_path()), device="cpu", dtype="float32")


@pytest.fixture
def score(bundled, tmp_path, monkeypatch):
    """Runs the command on rows; one strategy and batch size, so that it compiles once."""
    monkeypatch.setattr("flexmask_cli.planned_run.load_engine", lambda *_: bundled)

    def run(*arguments, rows=ROWS, output="out.feather"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ["-i", path, "-s", "causal", "--batch-size", 2, "-o", tmp_path / output]
        return run_command("score", *options, *arguments)

    return run


def test_scores_of_a_data_set_equal_those_of_transformers(score, bundled, tmp_path):
    outcome = score()
    assert outcome.status == 0, outcome.err
    rows = read_finished_rows(tmp_path / "out.feather").to_pylist()
    assert [row["uuid"] for row in rows] == ["ada", "tie", "open"]
    reference = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    for row in rows:
        prompt = "".join([*row["paraphrases"], row["suffix"]])
        values = []
        for number, choice in enumerate(row["choices"]):
            before, whole = (
                bundled.tokenizer(text).input_ids for text in (prompt, prompt + choice)
            )
            assert whole[: len(before)] == before
            with torch.no_grad():
                logits = reference(torch.tensor([whole])).logits[0, len(before) - 1 : -1]
            tokens = whole[len(before) :]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert row["token_logprobs"][number] == pytest.approx(expected.tolist(), abs=1e-4)
            assert row["tokens"][number] == len(tokens)
            assert row["bytes"][number] == len(choice.encode())
            values.append(row["logprobs"][number])
        assert row["chosen"] == values.index(max(values))
        assert row["prediction"] == row["choices"][row["chosen"]].strip()
        assert row["is_tie"] == (values.count(max(values)) > 1)
        is_right = None if row["answer"] is None else row["chosen"] == row["answer"]
        assert row["correct"] == is_right
    assert [row["answer"] for row in rows] == [0, 2, None]
    assert [row["answers"] for row in rows] == [["London"], ["Bob"], []]
    assert f"{rows[0]['correct'] + rows[1]['correct']} of 2 exact" in outcome.out
    assert "3 scored" in outcome.out


def test_a_resumed_run_scores_what_is_missing_and_judges_corrected_answers(score, tmp_path):
    assert score(rows=ROWS[:1]).status == 0
    (first,) = read_finished_rows(tmp_path / "out.feather").to_pylist()
    corrected = [{**ROWS[0], "answer": first["chosen"]}, *ROWS[1:]]
    outcome = score("--resume", rows=corrected)
    assert "rows: 2 scored" in outcome.out
    rows = read_finished_rows(tmp_path / "out.feather").to_pylist()
    assert rows[0]["correct"] is True
    assert rows[0]["logprobs"] == first["logprobs"]
    changed = [{**ROWS[0], "choices": [" London", " Paris"]}, *ROWS[1:]]
    assert (
        "choices of requests have changed since (uuid 'ada')"
        in score("--resume", rows=changed).error
    )
    assert "judge.normalize: 'none' → 'bytes'" in score("--resume", "--normalize", "bytes").error
    assert read_run_config(tmp_path / "out.feather").run["scores"] == "choices"


def test_shards_merge_into_the_file_of_one_run(score, tmp_path):
    assert score().status == 0
    for number in range(1, 5):  # the first has no row
        assert score("--shard", f"{number}/4", output=f"{number}.jsonl").status == 0
    parts = [tmp_path / f"{number}.jsonl" for number in (4, 2, 1, 3)]
    assert run_command("merge", *parts, "-o", tmp_path / "merged.feather").status == 0
    whole, merged = (
        read_finished_rows(tmp_path / name).to_pylist()
        for name in ("out.feather", "merged.feather")
    )
    assert [row["logprobs"] for row in merged] == [
        pytest.approx(row["logprobs"], abs=1e-5) for row in whole
    ]
    kept = ("uuid", "chosen", "answer", "is_tie", "correct", "tokens", "finish_reason")
    assert [[row[name] for name in kept] for row in merged] == [
        [row[name] for name in kept] for row in whole
    ]


def test_fusions_and_normalizations_are_compared_by_eval(score, tmp_path):
    paths = []
    for fusion in ("each", "mean", "mean_prob"):
        name = f"{fusion}.jsonl"
        outcome = score("--fusion", fusion, "--normalize", "tokens", output=name, rows=ROWS[:2])
        assert outcome.status == 0, outcome.err
        paths.append(tmp_path / name)
    each, mean, mixed = ([json.loads(line) for line in p.read_text().splitlines()] for p in paths)
    assert [row["segment"] for row in each] == [1, 2, 1, 2]
    alone = torch.tensor([row["logprobs"] for row in each[:2]], dtype=torch.float64)
    assert mean[0]["logprobs"] == pytest.approx(alone.mean(0).tolist())
    expected = (alone.logsumexp(0) - torch.tensor(2.0).log()).tolist()
    assert mixed[0]["logprobs"] == pytest.approx(expected)
    assert mean[0]["is_greedy"] == [None] * 3
    values = [total / n for total, n in zip(mean[0]["logprobs"], mean[0]["tokens"], strict=True)]
    assert mean[0]["chosen"] == values.index(max(values))
    found = json.loads(run_command("eval", *paths, "--json").out)
    assert [file["judged"] for file in found["files"]] == [2, 2, 2]
    means = [file["metrics"]["exact"]["mean"] for file in found["files"]]
    assert means[1] == sum(row["correct"] for row in mean) / 2
    pairs = {(item["first"], item["second"]) for item in found["comparisons"]}
    assert pairs == {tuple(map(str, pair)) for pair in combinations(paths, 2)}


def test_compare_scores_its_cells_as_score_does(score, tmp_path):
    rows, folder = ROWS[:2], tmp_path / "report"
    fusions = ["attention", "none", "mean", "mean_prob"]
    for fusion in fusions:
        options = ["--fusion", fusion, "--normalize", "tokens"]
        assert score(*options, rows=rows, output=f"{fusion}.feather").status == 0
    command = ["compare", "--score", "--normalize", "tokens", "-i", tmp_path / "rows.jsonl"]
    command += ["-s", "causal", "--fusions", "none,mean,mean_prob", "--batch-size", 2]
    outcome = run_command(*command, "-o", folder)
    assert outcome.status == 0, outcome.err
    cells = json.loads((folder / "report.json").read_text())["cells"]
    assert [cell["fusion"]["name"] for cell in cells] == fusions
    for cell, fusion in zip(cells, fusions, strict=True):
        scored = tmp_path / f"{fusion}.feather"
        table = read_finished_rows(folder / cell["file"])
        assert table.equals(read_finished_rows(scored))
        (file,) = json.loads(run_command("eval", scored, "--json").out)["files"]
        assert cell["score"] == file["metrics"]["exact"]
        found = table.to_pylist()
        chosen = [row["logprobs"][row["chosen"]] for row in found]
        assert cell["mean_logprob"] == pytest.approx(sum(chosen) / 2)
        assert cell["ms_per_question"] > 0
        assert cell["tokens_per_s"] is cell["first_token_ms"] is None
        before = (folder / cell["file"]).read_bytes()
        again = [*options[:1], fusion, *options[2:], "--resume"]
        assert score(*again, rows=rows, output=folder / cell["file"]).status == 0
        assert (folder / cell["file"]).read_bytes() == before
    assert "logprob" in outcome.out
    assert "tokens/s" not in outcome.out
    page = (folder / "report.html").read_text()
    assert "the choice with the highest log-probability per token" in page
    assert data_of(page)["cells"][-1]["logprobs"] == [round(logprob, 3) for logprob in chosen]
    resumed = run_command(*command, "-o", folder, "--resume", "--json")
    assert json.loads(resumed.out) == cells


def test_ways_with_equal_prompts_are_scored_once(score, tmp_path):
    assert score(rows=ROWS[:2]).status == 0
    command = ["compare", "--score", "-i", tmp_path / "rows.jsonl", "-s", "causal,tree"]
    command += ["--num-segments", "1", "--batch-size", 2, "-o", tmp_path / "report"]
    outcome = run_command(*command)
    assert outcome.status == 0, outcome.err
    assert "any strategy (1) is also none (1), mean (1)\n" in outcome.out
    assert len([*(tmp_path / "report").glob("*.feather")]) == 1


def test_show_says_how_likely_the_chosen_choice_was(score, tmp_path):
    assert score(rows=ROWS[:1]).status == 0
    (row,) = read_finished_rows(tmp_path / "out.feather").to_pylist()
    outcome = run_command("show", tmp_path / "out.feather", "--ascii")
    assert f"prediction  {row['prediction']}  (" in outcome.out
    assert f"logprob     {row['logprobs'][row['chosen']]:.3f}" in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--normalize", "bytes"], "--normalize needs --score"),
        (["--score", "--fusions", "vote"], "under the fusions attention, none, each, mean, mean"),
        (["--score", "--logprobs"], "--score generates nothing; leave out --logprobs"),
        (
            ["--score", "--temperature", "1", "--judge", "f1"],
            "--score generates nothing; leave out --temperature, --judge",
        ),
        (["--score"], "the row has no 'choices', a list of strings; its columns: 'uuid', "),
    ],
)
def test_mistakes_about_a_comparison_of_scores_are_one_line(score, tmp_path, options, message):
    assert message in run_command("compare", *options, "-o", tmp_path / "report").error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": None}, "rows.jsonl:1: the row has no 'choices', a list of strings; its"),
        ({"choices": []}, "rows.jsonl:1: choices must be at least two, got none"),
        ({"choices": [" a"]}, "rows.jsonl:1: choices must be at least two, got only ' a'"),
        ({"choices": [" a", ""]}, "rows.jsonl:1: choice 2 is empty"),
        ({"answer": "Rome"}, "rows.jsonl:1: the answer 'Rome' is none of the choices: ' London',"),
        ({"answer": 3}, "rows.jsonl:1: the answer must be the index of one of 3 choices, 0 to 2"),
        ({"answer": [1]}, "answer must be the index or the text of a choice, got an array"),
    ],
)
def test_rows_that_cannot_be_scored_are_told_in_one_line(score, row, message):
    assert message in score(rows=[{**ROWS[0], **row}]).error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--normalize", "words"], "normalize must be one of none, tokens, bytes, got 'words'"),
        (
            ["--fusion", "vote"],
            "under the fusions attention, none, each, mean, mean_prob, got 'vo",
        ),
    ],
)
def test_options_of_scores_are_told_before_the_input_is_read(score, options, message):
    assert message in score(*options, rows=[]).error


def test_choices_show_in_a_dry_run_and_a_task_writes_them(score, tmp_path):
    task = tmp_path / "task.toml"
    task.write_text(
        '[prompt]\nsegment = "Q: {{ paraphrase }}"\nsuffix = "\\nA:"\nchoice = " {{ choice }}"\n'
        '[paraphrases.groups]\nquestion = ["question"]\n'
    )
    row = {"question": "Where?", "choices": ["here", "there"], "answer": "there"}
    outcome = score("--task", task, "--dry-run", rows=[row])
    assert outcome.status == 0, outcome.err
    assert "<choice 0> here</choice 0>\n<choice 1> there</choice 1>\n" in outcome.out
    assert outcome.out.endswith("accepted: there\n\n")
