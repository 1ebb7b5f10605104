"""Runs on a Ray cluster of this machine: the file of one process, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from command import run_command

ray = pytest.importorskip("ray", reason="needs pip install 'flexmask[ray]'")

from flexmask.errors import OptionError, OutputError, RequestError  # noqa: E402
from flexmask.ray_run import Cluster, chosen_workers, number_of_shards  # noqa: E402
from flexmask.results.result_writer import read_finished_rows  # noqa: E402
from flexmask.results.shard_files import shard_folder, worker_of  # noqa: E402
from ray_runs import Heard, QuickPredictor, die_then_fail_at, job, run_job, wait  # noqa: E402

ROWS = 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs, one for all tests."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Workers are processes of their own, and unpickle what these modules define.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """An input with a bad row and a uuid that two shards have."""
    path = tmp_path / "rows.jsonl"
    content: list[dict[str, Any]] = [
        {"uuid": f"q{n}", "segments": [f"Q{n}"], "answers": [f"q{n}?"]} for n in range(ROWS)
    ]
    content[5] = {"uuid": "q5"}
    content[20]["uuid"] = "q1"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture
def whole(rows: Path, tmp_path: Path) -> bytes:
    """The file that one process writes."""
    path = tmp_path / "whole.feather"
    alone = job(rows)
    with alone.open_writer(path, alone.open_requests(), "new") as writer:
        for _ in alone.run(alone.load_engine(), alone.make_strategy(), writer).batches(bool):
            pass
    return path.read_bytes()


def check_whole(output: Path, whole: bytes) -> None:
    """Rows, metadata and batches are those of one process, and nothing else is left."""
    assert output.read_bytes() == whole
    assert not list(output.parent.glob(f"{output.name}.*"))


def kill_a_worker(folder: Path) -> None:
    """Kill the first worker that has written rows of a shard and not all of them."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        for journal in folder.glob("*.partial"):
            worker = worker_of(journal.with_suffix(""))
            if worker and num_rows(journal):
                os.kill(worker["pid"], signal.SIGKILL)
                return
        time.sleep(0.01)


def test_the_command_writes_the_file_of_one_process_though_a_worker_is_killed(
    cluster: str, tmp_path: Path
) -> None:
    command = ["generate", "--device", "cpu", "--limit", ROWS, "--batch-size", 2]
    command += ["--max-new-tokens", 4]
    whole, output = tmp_path / "whole.feather", tmp_path / "out.feather"
    alone = run_command(*command, "--output", whole)
    assert alone.status == 0, alone.err
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_a_worker, shard_folder(output))
        done = run_command(*command, "--output", output, "--engine", "ray", "--verbose")
        killing.result()
    assert done.status == 0, done.err
    assert "note: worker 3 starts" in done.err
    assert "warning: worker " in done.err
    check_whole(output, whole.read_bytes())
    assert done.out.splitlines()[0].split() == ["question", "prediction", "accepted"]
    assert done.out.splitlines()[-2] == alone.out.splitlines()[-2]  # accuracy
    again = run_command(*command, "--output", output, "--engine", "ray", "--resume")
    assert again.status == 0, again.err
    assert again.out.endswith(f"{ROWS} rows in {output}\n")


def test_the_command_scores_the_choices_that_one_process_scores(
    cluster: str, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"segments": ["Q: Who?"], "suffix": "\nA:", "choices": [" Ada", " Bob B."], "answer": 0}
    rows.write_text("".join(json.dumps({**row, "uuid": f"q{n}"}) + "\n" for n in range(4)))
    command = ["score", "--device", "cpu", "--batch-size", 1, "-s", "causal", "-i", rows]
    whole, output = tmp_path / "whole.feather", tmp_path / "out.feather"
    alone = run_command(*command, "--output", whole)
    assert alone.status == 0, alone.err
    cluster_options = ["--engine", "ray", "--workers", 1]
    done = run_command(*command, "--output", output, *cluster_options)
    assert done.status == 0, done.err
    check_whole(output, whole.read_bytes())
    shown, *_ = done.out.partition("fusion: ")
    assert alone.out.startswith(shown)
    again = run_command(*command, "--output", output, *cluster_options, "--resume")
    assert again.out.endswith(f"4 rows in {output}\n")


def test_a_row_that_ends_three_workers_ends_a_run_that_does_not_skip_and_resumes(
    cluster: str, rows: Path, whole: bytes, tmp_path: Path
) -> None:
    output, heard = tmp_path / "out.feather", Heard()
    deadly = partial(die_then_fail_at, "q10", tmp_path)
    with pytest.raises(RequestError, match=r"uuid 'q10': three workers died"):
        run_job(job(rows, deadly, on_error="stop"), output, heard=heard)
    assert not output.exists()
    *killed, failed = heard.warnings
    assert ["Worker unexpectedly exits" in warning for warning in killed] == [True, True]
    assert "with 1 rows in flight (RuntimeError: CUDA error: an illegal memory" in failed
    outcome = run_job(job(rows), output, "resume")
    check_whole(output, whole)
    assert outcome.stats is not None
    assert outcome.summary.resumed + outcome.stats.generations == outcome.summary.rows - 2
    assert (outcome.summary.rows, outcome.summary.failed) == (ROWS, 2)
    with pytest.raises(OutputError, match=r"out.feather: exists; pass `resume`"):
        run_job(job(rows), output)


def num_rows(journal: Path) -> int:
    try:
        return read_finished_rows(journal).num_rows if journal.stat().st_size else 0
    except (OutputError, FileNotFoundError):  # just finished, or just begun
        return 0


def wait_for_rows(output: Path, least: int) -> None:
    until = time.monotonic() + 120
    while sum(map(num_rows, shard_folder(output).glob("*.partial"))) < least:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_driver_is_killed_and_stopped_and_a_journal_lost_and_the_file_is_the_same(
    cluster: str, rows: Path, whole: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.feather"
    driver = [sys.executable, str(Path(__file__).with_name("ray_runs.py"))]
    with subprocess.Popen([*driver, cluster, str(rows), str(output), "0.5"]) as process:
        wait_for_rows(output, 2)
        process.kill()
    with pytest.raises(OutputError, match=r"holds the shards of an interrupted run"):
        run_job(job(rows), output)
    next(shard_folder(output).glob("*.partial")).unlink()
    stopping = Heard(stop_at_rows=1)
    stopped = run_job(job(rows, partial(wait, 0.3)), output, "resume", stopping)
    assert not stopped.is_complete
    assert 1 < stopped.summary.rows < ROWS
    outcome = run_job(job(rows), output, "resume")
    check_whole(output, whole)
    assert 1 < outcome.summary.resumed < ROWS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Data about itself
def test_a_pipeline_gets_answers_and_errors_in_columns(cluster: str) -> None:
    rows = [{"uuid": f"q{n}", "segments": [f"Q{n}"]} for n in range(6)]
    rows[2]["segments"] = []
    answered = ray.data.from_items(rows, override_num_blocks=2).map_batches(
        QuickPredictor, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1
    )
    found = {row["uuid"]: row for row in answered.take_all()}
    assert {uuid: row["error"] for uuid, row in found.items() if row["error"]} == {
        "q2": "segments must hold at least one text, got none"
    }
    assert [found[f"q{n}"]["prediction"] for n in (0, 2, 5)] == ["q0?", "", "q5?"]


@pytest.mark.parametrize(
    ("rows", "workers", "shards"),
    [(1, 2, 1), (24, 2, 8), (20_000, 2, 64), (20_000, 8, 78), (10_000_000, 1000, 32_000)],
)
def test_there_are_more_shards_than_workers(rows: int, workers: int, shards: int) -> None:
    assert number_of_shards(rows, workers) == shards


def test_workers_are_as_many_as_the_cluster_has_gpus_or_cpus() -> None:
    mixed = [{"CPU": 16.0, "GPU": 3.0}, {"CPU": 16.0, "GPU": 1.0}]
    assert chosen_workers(Cluster(), mixed) == (4, True)
    assert chosen_workers(Cluster(device="cpu"), mixed) == (32, False)
    assert chosen_workers(Cluster(workers=3), mixed) == (3, True)
    assert chosen_workers(Cluster(ranks=2), mixed) == (1, True)
    assert chosen_workers(Cluster(), [{"CPU": 2.0}]) == (2, False)
    assert chosen_workers(Cluster(ranks=2), [{"CPU": 3.0}] * 2) == (2, False)
    for cluster, message in (
        (Cluster(workers=5), "has room for 4 workers with a GPU, too few for `workers=5`"),
        (Cluster(ranks=4), "no room for a worker with 4 GPUs of one machine"),
        (Cluster(device="cuda:1"), "each worker has a GPU of its own"),
    ):
        with pytest.raises(OptionError, match=message):
            chosen_workers(cluster, mixed)
    with pytest.raises(OptionError, match="no room for a worker with a GPU"):
        chosen_workers(Cluster(device="cuda"), [{"CPU": 2.0}])
