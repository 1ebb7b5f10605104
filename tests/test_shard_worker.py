"""Workers and their queue in this process: a death is an error that passes through."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flexmask.errors import OutputError
from flexmask.fusion import Fusion
from flexmask.inputs.rows import rows_in_memory
from flexmask.request import Request
from flexmask.results.merge import merge
from flexmask.results.result_writer import read_finished_rows
from flexmask.results.shard_files import ShardFolder, rows_in_flight, shard_folder, worker_of
from flexmask.results.shard_queue import Assignment, ShardQueue
from flexmask.results.shard_worker import ForwardRows, ShardWorker
from flexmask.tasks.input_survey import survey
from flexmask.tasks.judge import ChoiceJudge

pytest.importorskip("ray", reason="needs pip install 'flexmask[ray]'")

from ray_runs import answer, job

ROWS = 24


class DeathError(BaseException):
    """Ends a worker without cleaning up."""


class LocalAssignments:
    """A queue as one worker of this process sees it."""

    def __init__(self, queue: ShardQueue, worker: str) -> None:
        self._queue, self._worker = queue, worker
        self.opened, self.warn = queue.opened, queue.warn
        self.report = partial(queue.report, worker)
        self.finish = partial(queue.finish, worker)
        self.give_back = partial(queue.give_back, worker)

    def take(self, *, may_be_alone: bool) -> Assignment | None:
        return self._queue.take(self._worker, may_be_alone=may_be_alone)


class Run:
    """A run whose workers come one after another."""

    def __init__(self, folder: Path, count: int = 4, **options: Any) -> None:
        self.options = options
        self.rows = folder / "rows.jsonl"
        content = [
            {"uuid": f"q{n}", "segments": [f"Q{n}"], "choices": [" a", " b"], "answer": n % 2}
            for n in range(ROWS)
        ]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in content))
        found = survey(job(self.rows).open_requests())
        self.output = folder / "out.feather"
        self.folder = ShardFolder.open(self.output, "new", found, lambda _: count)
        self.queue = ShardQueue(count)
        self.deaths: list[int] = []

    def work(self, name: str, act: Callable[[Request], object] = answer) -> tuple[Any, bool]:
        """Let a worker run; return what `ShardQueue.lose` says if it dies."""
        run = job(self.rows, act, **self.options)
        worker = ShardWorker(run, self.folder, LocalAssignments(self.queue, name))
        try:
            worker.run()
        except (DeathError, RuntimeError) as error:
            held = self.queue.held_by(name)
            in_flight = {number: rows_in_flight(self.folder.file(number)) for number in held}
            self.deaths.append(sum(map(len, in_flight.values())))
            return self.queue.lose(name, in_flight, repr(error))
        return None, False

    def merged(self) -> dict[str, dict[str, Any]]:
        assert self.folder.finished() == [*range(1, self.folder.count + 1)]
        assert not list(self.folder.path.glob("*.started"))
        merge(self.folder.files(), self.output, is_replaced=True)
        rows = read_finished_rows(self.output).to_pylist()
        assert [row["uuid"] for row in rows] == [f"q{n}" for n in range(ROWS)]
        return {row["uuid"]: row for row in rows}


def die_at(uuids: set[str], request: Request) -> None:
    if request.uuid in uuids:
        raise DeathError(request.uuid)


def test_a_row_that_workers_die_of_three_times_is_run_alone_and_given_up(tmp_path: Path) -> None:
    run = Run(tmp_path)
    deadly = partial(die_at, {"q10"})
    outcomes = [run.work(f"w{n}", deadly) for n in range(4)]
    assert outcomes == [(None, False), (None, False), (("q10", None, 0), False), (None, False)]
    assert run.deaths[-1] == 1
    assert min(run.deaths[:2]) > 1
    rows = run.merged()
    assert [uuid for uuid, row in rows.items() if row["error"]] == ["q10"]
    assert (
        "rows.jsonl:11: 3 workers died while they computed it; the last: Death"
        in (rows["q10"]["error"])
    )


def test_a_sample_that_workers_die_of_is_given_up_and_the_others_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, fusion=Fusion(samples=2))

    def deadly(request: Request) -> None:
        die_at({"q10"} if request.sample == 1 else set(), request)

    given_up = [run.work(f"w{n}", deadly)[0] for n in range(4)]
    assert given_up[2] == ("q10", None, 1)
    merge(run.folder.files(), run.output, is_replaced=True)
    rows = read_finished_rows(run.output).to_pylist()
    keys = [(row["uuid"], row["sample"]) for row in rows]
    assert keys == [(f"q{n}", sample) for n in range(ROWS) for sample in (0, 1)]
    assert [(row["uuid"], row["sample"]) for row in rows if row["error"]] == [("q10", 1)]


def test_scores_of_shards_are_those_of_one_process_though_workers_die(tmp_path: Path) -> None:
    run = Run(tmp_path, judge=ChoiceJudge())
    for name in ("w0", "w1", "w2", "w3"):
        run.work(name, partial(die_at, {"q10"}))
    rows = run.merged()
    assert [uuid for uuid, row in rows.items() if row["error"]] == ["q10"]
    assert rows["q10"]["chosen"] is None
    alone = job(run.rows, judge=ChoiceJudge())
    with alone.open_writer(tmp_path / "whole.feather", alone.open_requests(), "new") as writer:
        for _ in alone.run(alone.load_engine(), alone.make_strategy(), writer).batches(bool):
            pass
    whole = {
        row["uuid"]: row for row in read_finished_rows(tmp_path / "whole.feather").to_pylist()
    }
    assert rows == {**whole, "q10": rows["q10"]}
    assert [whole[f"q{n}"]["correct"] for n in range(3)] == [False, True, False]
    assert run.queue.progress().tokens == 2 * (ROWS - 1)


def test_two_deaths_mark_no_row(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for name in ("w0", "w1"):
        run.work(name, partial(die_at, {"q10"}))
    run.work("w2")
    assert not any(row["error"] for row in run.merged().values())


def test_two_rows_that_workers_die_of_are_told_apart(tmp_path: Path) -> None:
    run = Run(tmp_path)
    deadly = partial(die_at, {"q3", "q4"})
    given_up = [run.work(f"w{n}", deadly)[0] for n in range(7)]
    assert sorted(key for key in given_up if key) == [("q3", None, 0), ("q4", None, 0)]
    assert {uuid for uuid, row in run.merged().items() if row["error"]} == {"q3", "q4"}


def test_workers_that_die_without_a_row_are_started_three_times() -> None:
    queue = ShardQueue(2)
    outcomes = []
    for name in "abc":
        taken = queue.take(name, may_be_alone=True)
        assert taken is not None
        outcomes.append(queue.lose(name, {taken.number: []}, "exit code 1"))
    assert outcomes == [(None, False), (None, False), (None, True)]
    assert queue.has_more()
    queue.stop()
    assert not queue.has_more()
    assert queue.take("d", may_be_alone=True) is None


def test_a_worker_that_is_stopped_leaves_its_rows_in_journals(tmp_path: Path) -> None:
    run = Run(tmp_path)

    def stop_at_q8(request: Request) -> None:
        if request.uuid == "q8":
            run.queue.stop()

    run.work("w0", stop_at_q8)
    assert run.folder.finished() == [1]
    assert worker_of(run.folder.file(2)) is None
    found = read_finished_rows(run.folder.file(2).with_suffix(".feather.partial"))
    assert found["uuid"].to_pylist() == ["q6", "q7", "q8"]
    run.queue = ShardQueue(4)
    run.work("w1")
    run.merged()
    assert run.queue.resumed_rows() == 9


def test_a_folder_of_shards_is_resumed_for_the_same_input_only(tmp_path: Path) -> None:
    run = Run(tmp_path)
    found = run.folder.survey
    resumed = ShardFolder.open(run.output, "resume", found, lambda _: 99)
    assert resumed.count == 4
    with pytest.raises(OutputError, match="holds the shards of an interrupted run"):
        ShardFolder.open(run.output, "new", found, lambda _: 4)
    with run.rows.open("a") as file:
        file.write('{"uuid": "new", "segments": ["x"]}\n')
    longer = survey(job(run.rows).open_requests())
    with pytest.raises(OutputError, match=r"another input \(rows: 24 → 25; digest: "):
        ShardFolder.open(run.output, "resume", longer, lambda _: 4)
    assert ShardFolder.open(run.output, "overwrite", longer, lambda _: 5).count == 5
    mine = shard_folder(tmp_path / "mine.feather")
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(OutputError, match="not a folder of shards"):
        ShardFolder.open(tmp_path / "mine.feather", "overwrite", longer, lambda _: 4)
    assert (mine / "thesis.tex").exists()


def test_parts_that_ascend_are_read_in_one_pass() -> None:
    rows = rows_in_memory([{"n": n} for n in range(10)], "rows")
    starts: list[int] = []

    def counted(first: int) -> Any:
        starts.append(first)
        return rows.read(first)

    from dataclasses import replace
    from itertools import islice

    forward = ForwardRows(replace(rows, read=counted))
    read = [[row.number for row in islice(forward(first), 2)] for first in (0, 2, 6, 9, 4, 6)]
    assert read == [[1, 2], [3, 4], [7, 8], [10], [5, 6], [7, 8]]
    assert starts == [0, 4]
