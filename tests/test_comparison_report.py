"""The table of a comparison and its page, from result files."""

import json
from dataclasses import replace

import pytest

from comparison_folder import CONFIG, made_up_cell, write_cell, write_comparison
from flexmask.compare.comparison_run import CellRunner, ReportFolder
from flexmask.errors import OptionError, OutputError
from flexmask.request import Request
from flexmask.results.dataset_run import GenerationJob
from flexmask.results.evaluation import compare, evaluate
from flexmask.tasks.judge import Judge
from page_data import data_of

REQUESTS = [
    Request((f"Q {number}?", "again?"), answers=("yes",), uuid=str(number)) for number in range(20)
]


def test_each_cell_is_compared_with_the_first_as_flexmask_eval_does(tmp_path):
    first, second, failed = (made_up_cell(name, 2) for name in ("causal", "mean", "max"))
    cells = {first: ["yes"] * 5 + ["no"] * 15, second: ["no"] + ["yes"] * 19}
    results = write_comparison(tmp_path, cells, REQUESTS, failed)
    files = [evaluate(ReportFolder(tmp_path).rows(cell), ["exact"]) for cell in cells]
    (wanted,) = compare(files)
    assert results[0].against_first is None
    assert results[1].against_first == wanted
    assert results[1].score == files[1].estimates["exact"]
    figures = results[1].figures()
    assert (figures["better_than_first"], figures["first_better"]) == (15, 1)
    assert (figures["ms_per_question"], figures["prompt_tokens"]) == (100.0, 20.0)
    assert results[2].figures()["error"] == "it <b>broke</b>"
    assert results[2].score is None
    assert results[2].measurement is None
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["cells"] == [json.loads(json.dumps(result.figures())) for result in results]


def test_without_accepted_answers_cells_are_compared_by_cost_alone(tmp_path):
    requests = [Request(("Q?", "q?"), uuid=str(number)) for number in range(3)]
    first, failed = made_up_cell("causal", 2), made_up_cell("max", 2)
    (result, _) = write_comparison(tmp_path, {first: ["a", "b", "c"]}, requests, failed)
    assert result.score is None
    assert result.figures()["ms_per_question"] is not None
    data = data_of((tmp_path / "report.html").read_text())
    assert not data["isJudged"]
    assert [data["texts"][number] for number in data["cells"][0]["answers"]] == ["a", "b", "c"]


def test_a_page_of_a_thousand_questions_and_twenty_cells_stays_small(tmp_path):
    prefix = "Q: an example?\nA: of the prompt\n\n" * 5
    requests = [
        Request(
            tuple(f"Q: paraphrase {part} of question {number}, rather long?" for part in range(5)),
            prefix=prefix,
            suffix="\nA:",
            answers=(f"answer {number}",),
            uuid=f"question-{number}",
        )
        for number in range(1000)
    ]
    cells = {
        made_up_cell(f"strategy {cell}", 5): [
            f"answer {number + (number % (cell + 2) == 0)}" for number in range(1000)
        ]
        for cell in range(20)
    }
    write_comparison(tmp_path, cells, requests, made_up_cell("max", 5))
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 600_000
    data = data_of(page)
    assert len(data["shared"]) == 2
    assert [len(cell["answers"]) for cell in data["cells"]] == [1000] * 20 + [0]


@pytest.fixture
def runner(tmp_path):
    """Makes what runs cells; nothing here needs an engine."""

    def get(mode, config=CONFIG):
        return CellRunner(
            load_engine=pytest.fail,
            folder=ReportFolder(tmp_path),
            requests_of={1: [request.with_segments(1) for request in REQUESTS]},
            job_of=lambda way: GenerationJob(
                open_requests=pytest.fail,
                make_strategy=pytest.fail,
                load_engine=pytest.fail,
                record=lambda: config,
                fusion=way.fusion,
                judge=Judge(),
                on_error="stop",
                options={},
            ),
            mode=mode,
            machine={},
        )

    return get


def test_results_that_stand_there_are_found_before_anything_runs(runner):
    cell, new = made_up_cell("causal", 1), runner("new")
    new.check([cell])
    assert not new.has_result(cell)
    write_cell(new.folder, cell, REQUESTS, ["yes"] * 20)
    with pytest.raises(OutputError, match=r"causal-1.feather: exists; pass `resume`"):
        new.check([cell])
    assert not runner("overwrite").has_result(cell)
    resumed = runner("resume")
    resumed.check([cell])
    assert resumed.has_result(cell)
    before = resumed.folder.rows(cell).read_bytes(), resumed.folder.times(cell).read_bytes()
    resumed.run(cell, watch=pytest.fail)
    assert before == (
        resumed.folder.rows(cell).read_bytes(),
        resumed.folder.times(cell).read_bytes(),
    )
    other = replace(CONFIG, run={**CONFIG.run, "max_new_tokens": 5})
    with pytest.raises(OutputError, match=r"different run \(max_new_tokens: 4 → 5\)"):
        runner("resume", other).check([cell])


def test_two_cells_with_one_file_name_are_refused(runner):
    one, other = made_up_cell("a:b", 1), made_up_cell("a_b", 1)
    with pytest.raises(OptionError, match=r"a:b \(1\) and a_b \(1\) would both be written to"):
        runner("new").check([one, other])
