"""``flexmask compare`` as a user runs it, on the bundled model."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.feather
import pytest

from command import run_command
from flexmask.demo import questions_path
from flexmask_cli.app import main

PAGE = (Path(__file__).parents[1] / "docs" / "compare.md").read_text()
COMMAND = [sys.executable, "-m", "flexmask_cli", "compare", "--device", "cpu"]
SMALL = ["--limit", "6", "--batch-size", "2", "--max-new-tokens", "4", "--stop", "\\n"]


def run(*arguments):
    command = [*COMMAND, *SMALL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_here(*arguments):
    """Run a comparison in this process, where what is compiled serves all of them."""
    return run_command(*COMMAND[3:], *SMALL, *arguments)


@pytest.fixture
def error_of(monkeypatch, capfd):
    """Runs a command that must fail; gives its one line on stderr."""

    def get(*arguments):
        monkeypatch.setattr(sys, "argv", ["flexmask", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert isinstance(exit_.value.code, str)
        assert "\n" not in exit_.value.code
        return exit_.value.code

    return get


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The command of the documents on a few questions: what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("compare") / "report"
    (command,) = re.findall(r"\$ flexmask compare (.*) --output report\n", PAGE)
    options = [*shlex.split(command), "--output", folder]
    result = run(*options)
    assert result.returncode == 0, result.stderr
    return options, folder, result


NAMES = [
    "any strategy (1)",
    "ensemble_isolation (2)",
    "ensemble_isolation:positions=sequential (2)",
    "mean (2)",
]


def test_the_table_has_a_line_for_each_cell_and_says_what_is_the_same(finished):
    _, folder, result = finished
    header, *lines = result.stdout.splitlines()
    assert re.split("  +", header.strip())[:5] == [
        "what", "segments", "accuracy", "against the first", "tokens/s"
    ]  # fmt: skip
    assert [re.split("  +", line)[0] for line in lines[:4]] == [
        "any strategy",
        "ensemble_isolation",
        "ensemble_isolation:positions=sequential",
        "mean",
    ]
    (same,) = re.findall(r"```text\n(.*)\n```", PAGE)
    assert same in lines
    assert lines[-1] == str(folder / "report.html")
    notes = [f"note: {number} of 4: {name}" for number, name in enumerate(NAMES, start=1)]
    assert [line for line in result.stderr.splitlines() if "note" in line] == notes


def test_each_cell_has_a_result_file_as_generate_writes_it_and_its_times(finished):
    _, folder, _ = finished
    stems = ["any_strategy-1", "ensemble_isolation-2"]
    stems += ["ensemble_isolation_positions_sequential-2", "mean-2"]
    expected = ["report.html", "report.json"]
    expected += [f"{stem}{ending}" for stem in stems for ending in (".feather", ".times.json")]
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    cells = json.loads((folder / "report.json").read_text())["cells"]
    for stem, cell in zip(stems, cells, strict=True):
        assert pyarrow.feather.read_table(folder / cell["file"]).num_rows == 6
        assert cell["file"] == f"{stem}.feather"
        assert cell["tokens_per_s"] > 0
        assert cell["first_token_ms"] > 0
        assert cell["measured"]["rows"] == 6
        assert 0 < cell["measured"]["timed_rows"] < 6
        assert cell["peak_bytes"] is None
    assert cells[3]["prompt_tokens"] > cells[1]["prompt_tokens"]


def test_generate_takes_the_result_files_for_its_own(finished, monkeypatch, capsys):
    _, folder, _ = finished
    ways = {
        "ensemble_isolation_positions_sequential-2": ["-p", "positions=sequential"],
        "mean-2": ["--fusion", "mean"],
    }
    for stem, options in ways.items():
        path = folder / f"{stem}.feather"
        before = path.read_bytes()
        command = ["generate", *SMALL, "--num-segments", "2", *options, "--output", str(path)]
        monkeypatch.setattr(sys, "argv", ["flexmask", *command, "--resume"])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code in (0, None)
        assert f"6 rows in {path}" in capsys.readouterr().out
        assert path.read_bytes() == before


def test_a_finished_comparison_resumes_without_a_model_and_keeps_its_times(finished):
    options, folder, _ = finished
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run_here(*options, "--resume", "--json")
    assert result.status == 0, result.err
    assert "rows/s" not in result.err
    cells = json.loads(result.out)
    assert cells == json.loads(before["report.json"])["cells"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_killed_comparison_is_completed_by_resume(finished, tmp_path):
    options, folder, _ = finished
    options = [*options[:-1], tmp_path / "killed"]
    command = [*COMMAND, *SMALL, *map(str, options)]
    with subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        journal = tmp_path / "killed" / "ensemble_isolation-2.feather.partial"
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > 2000):
            time.sleep(0.01)
        process.kill()
    assert pyarrow.feather.read_table(tmp_path / "killed" / "any_strategy-1.feather").num_rows
    times = (tmp_path / "killed" / "any_strategy-1.times.json").read_bytes()
    result = run_here(*options, "--resume")
    assert result.status == 0, result.err
    for path in folder.glob("*.feather"):
        resumed = pyarrow.feather.read_table(tmp_path / "killed" / path.name)
        assert resumed.equals(pyarrow.feather.read_table(path))
    assert (tmp_path / "killed" / "any_strategy-1.times.json").read_bytes() == times


def test_a_cell_that_fails_is_reported_and_the_others_go_on(tmp_path):
    rows = [json.loads(line) for line in questions_path().read_text().splitlines()[:2]]
    rows[1]["segments"][1] = "Q: what " * 4500
    path, folder = tmp_path / "rows.jsonl", tmp_path / "report"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["-i", path, "-s", "causal", "--fusions", "", "--num-segments", "1,2"]
    result = run_here(*options, "-o", folder)
    assert result.status == 1
    assert "causal (2) failed" in result.err
    assert "rows.jsonl:2: needs positions up to" in result.err
    good, failed = json.loads((folder / "report.json").read_text())["cells"]
    assert good["rows"] == 2
    assert good["error"] is None
    assert failed["score"] is None
    assert "the model's context is 4096" in failed["error"]
    assert pyarrow.feather.read_table(folder / "causal-1.feather").num_rows == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-s", "casual"], "unknown strategy 'casual'; known: "),
        (["-s", "causal,causal"], "strategy causal is given twice"),
        (["-s", "causal:window=3"], "strategy 'causal' has no parameter 'window'"),
        (
            ["--fusions", "median"],
            "fusion must be one of attention, none, each, mean, mean_prob, max, ",
        ),
        (["--fusions", "weighted_mean"], "fusion 'weighted_mean' needs weights: column "),
        (["--num-segments", "1,0"], "--num-segments must be numbers as in 1,3,5 or all, got '0'"),
        (["--num-segments", "7"], "7 segments asked for, got 5; lower --num-segments"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--batch-size", "0"], "--batch-size must be a positive number or auto, got '0'"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    error_of, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert message in error_of("-n", 2, *arguments)
    assert list(tmp_path.rglob("*.feather*")) == []
