"""Result files. Run as a program, this file kills writers for the tests (`kill_…`)."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pytest

import flexmask
from flexmask.errors import OutputError, RequestError
from flexmask.fusion import Fusion
from flexmask.request import Request
from flexmask.results.output_path import default_output_path
from flexmask.results.result_writer import (
    ResultSummary,
    ResultWriter,
    check_output,
    read_finished_rows,
    read_run_config,
)
from flexmask.results.resume import OutputMode
from flexmask.results.run_config import RunConfig
from flexmask.results.schema import SCHEMA
from flexmask.tasks.request_source import BadRow
from result_runs import (
    CONFIG,
    answer,
    expected_table,
    interrupted_run,
    journal_of,
    make_requests,
    run,
    uuids,
)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results" / "out.feather"


def test_a_result_file_holds_what_was_asked_and_generated(output: Path) -> None:
    requests = make_requests(3)
    run(output, requests)
    table = pyarrow.feather.read_table(output)
    assert table.schema.equals(SCHEMA)
    assert table.column_names[:5] == [
        *("uuid", "answers", "paraphrases", "prediction", "generation"),
    ]
    assert table.to_pylist()[1] == {
        "uuid": "q1",
        "answers": ["1", "the 1"],
        "paraphrases": ["Q: 1?\nA:", "Q: what is 1?\nA:"],
        "prediction": "The 0.",
        "generation": " The 0.\nQ: next",
        "prefix": "Réponds.\n\n",
        "suffix": " →",
        "system": "",
        "messages": [],
        "answer_prefix": "",
        "segment_turns": "one",
        "prompts": None,
        "segment": None,
        "weights": None,
        "prompt_tokens": 41,
        "generated_tokens": 2,
        "finish_reason": "stop",
        "correct": False,
        "score": 0.0,
        "error": None,
    }
    assert table["correct"].to_pylist() == [True, False, None]
    assert os.listdir(output.parent) == ["out.feather"]


def test_pandas_reads_a_result_file(output: Path) -> None:
    pandas = pytest.importorskip("pandas")
    run(output, make_requests(2))
    frame = pandas.read_feather(output)
    assert list(frame["uuid"]) == ["q0", "q1"]
    assert list(frame["answers"][0]) == ["0", "the 0"]


def test_the_run_is_recorded_as_json_in_the_schema_metadata(output: Path) -> None:
    run(output, make_requests(1))
    metadata = pyarrow.feather.read_table(output).schema.metadata
    assert json.loads(metadata[b"flexmask"]) == {
        "run": CONFIG.run,
        "environment": CONFIG.environment,
        "earlier_environments": [],
    }
    assert read_run_config(output).run == CONFIG.run


def test_the_summary_counts_rows_and_correct_predictions(output: Path) -> None:
    requests = make_requests(6)
    interrupted_run(output, requests, at="q4")
    summary = run(output, requests, mode="resume")
    assert summary == ResultSummary(rows=6, resumed=4, judged=4, correct=2)
    assert summary.accuracy == 0.5
    assert ResultSummary(rows=1, resumed=0, judged=0, correct=0).accuracy is None


def test_rows_stand_in_input_order_whatever_the_order_of_writing(output: Path) -> None:
    requests = make_requests(9)
    shuffled = [requests[index] for index in (3, 4, 5, 0, 8, 7, 6, 1, 2)]
    with ResultWriter.open(output, config=CONFIG, requests=requests) as writer:
        writer.write([])
        writer.write(answer(request) for request in shuffled[:5])
        writer.write([answer(request) for request in shuffled[5:]])
    assert uuids(output) == [request.uuid for request in requests]


def test_a_run_of_no_requests_makes_an_empty_file(output: Path) -> None:
    run(output, [])
    assert pyarrow.feather.read_table(output).num_rows == 0


def test_rows_can_be_read_while_the_run_goes_on(output: Path) -> None:
    requests = make_requests(2)
    with ResultWriter.open(output, config=CONFIG, requests=requests) as writer:
        writer.write([answer(requests[1])])
        assert uuids(journal_of(output)) == ["q1"]
        assert read_run_config(journal_of(output)).run == CONFIG.run
        writer.write([answer(requests[0])])


def test_only_requested_rows_are_taken_and_each_once(output: Path) -> None:
    requests = make_requests(3)
    with (
        pytest.raises(KeyboardInterrupt),
        ResultWriter.open(output, config=CONFIG, requests=requests[:2]) as writer,
    ):
        writer.write([answer(requests[0])])
        for wrong in ([requests[0]], [requests[2]], [requests[1], requests[1]]):
            with pytest.raises(ValueError, match="takes one row"):
                writer.write(map(answer, wrong))
        raise KeyboardInterrupt
    assert uuids(journal_of(output)) == ["q0"]


def test_nothing_is_written_to_a_closed_writer(output: Path) -> None:
    requests = make_requests(2)
    with (
        pytest.raises(KeyboardInterrupt),
        ResultWriter.open(output, config=CONFIG, requests=requests) as writer,
    ):
        writer.write([answer(requests[0])])
        raise KeyboardInterrupt
    with pytest.raises(OutputError, match="Bad file descriptor"):
        writer.write([answer(requests[1])])


def test_requests_that_share_a_uuid_are_refused(output: Path) -> None:
    with pytest.raises(RequestError, match="uuid 'q0' is used by two requests"):
        run(output, [*make_requests(2), *make_requests(1)])
    assert os.listdir(output.parent) == []


def test_an_interrupted_run_keeps_its_finished_rows(output: Path) -> None:
    interrupted_run(output, make_requests(5), at="q3")
    assert os.listdir(output.parent) == ["out.feather.partial"]
    assert uuids(journal_of(output)) == ["q0", "q1", "q2"]


def test_a_run_interrupted_before_its_first_row_leaves_nothing(output: Path) -> None:
    interrupted_run(output, make_requests(5), at="q0")
    assert os.listdir(output.parent) == []


def test_a_run_that_ends_with_rows_missing_makes_no_file(output: Path) -> None:
    requests = make_requests(3)
    with (
        pytest.raises(OutputError, match="2 of 3 requests have no row yet; pass `resume`"),
        ResultWriter.open(output, config=CONFIG, requests=requests) as writer,
    ):
        writer.write([answer(requests[0])])
    assert os.listdir(output.parent) == ["out.feather.partial"]
    assert run(output, requests, mode="resume").rows == 3


def test_a_resumed_run_equals_an_undisturbed_one(output: Path, tmp_path: Path) -> None:
    requests = make_requests(8)
    for at in ("q2", "q3", "q7"):
        interrupted_run(output, requests, at=at, mode="resume")
    run(output, requests, mode="resume")
    assert pyarrow.feather.read_table(output).equals(
        expected_table(requests, tmp_path), check_metadata=True
    )
    assert os.listdir(output.parent) == ["out.feather"]


def test_a_journal_cut_at_any_byte_gives_its_whole_rows(output: Path) -> None:
    requests = make_requests(4)
    ends = []
    with (
        pytest.raises(KeyboardInterrupt),
        ResultWriter.open(output, config=CONFIG, requests=requests) as writer,
    ):
        ends.append(journal_of(output).stat().st_size)
        for request in requests[:3]:
            writer.write([answer(request)])
            ends.append(journal_of(output).stat().st_size)
        raise KeyboardInterrupt
    for size in range(ends[-1], -1, -1):
        os.truncate(journal_of(output), size)
        if size < ends[0]:
            with pytest.raises(OutputError, match="no flexmask run is recorded"):
                uuids(journal_of(output))
        else:
            whole_rows = sum(size >= end for end in ends[1:])
            assert uuids(journal_of(output)) == ["q0", "q1", "q2"][:whole_rows]


def test_a_cut_journal_is_resumed(output: Path, tmp_path: Path) -> None:
    requests = make_requests(4)
    expected = expected_table(requests, tmp_path)
    interrupted_run(output, requests, at="q3")
    content = journal_of(output).read_bytes()
    for size in {*range(0, len(content), 61), len(content)}:
        journal_of(output).write_bytes(content[:size])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(output, requests, mode="resume")
        said = [str(item.message).partition("; ")[0] for item in caught]
        assert said in ([], [f"{journal_of(output)}: ends in the middle of a write"])
        assert pyarrow.feather.read_table(output).equals(expected, check_metadata=True)
        output.unlink()


def test_a_full_disk_is_an_error_and_costs_no_finished_row(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(4)
    with ResultWriter.open(output, config=CONFIG, requests=requests) as writer:
        writer.write(map(answer, requests[:2]))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_half_then_fail(os.write))
            with pytest.raises(OutputError) as raised:
                writer.write([answer(requests[2])])
        assert str(raised.value) == (
            f"{journal_of(output)}: cannot be written (No space left on device); finished rows "
            "are kept, `resume` continues from them"
        )
        assert uuids(journal_of(output)) == ["q0", "q1"]
        writer.write(map(answer, requests[2:]))
    assert uuids(output) == ["q0", "q1", "q2", "q3"]


def write_half_then_fail(write: Callable[..., int]) -> Callable[..., int]:
    calls = itertools.count()

    def failing(fd: int, data: memoryview) -> int:
        if next(calls):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[: len(data) // 2])

    return failing


def test_a_disk_that_fills_up_at_the_end_costs_no_row(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(3)
    with (
        pytest.raises(OutputError, match=r"out.feather: cannot be written .No space left"),
        ResultWriter.open(output, config=CONFIG, requests=requests) as writer,
    ):
        writer.write(map(answer, requests))
        monkeypatch.setattr(os, "fsync", raise_no_space)
    monkeypatch.undo()
    assert os.listdir(output.parent) == ["out.feather.partial"]
    assert run(output, requests, mode="resume").resumed == 3
    assert uuids(output) == ["q0", "q1", "q2"]


def raise_no_space(fd: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_new_run_refuses_to_touch_a_result(output: Path) -> None:
    requests = make_requests(2)
    run(output, requests)
    with pytest.raises(OutputError, match=r"out\.feather: exists; pass `resume` .*`overwrite`"):
        run(output, requests)
    assert os.listdir(output.parent) == ["out.feather"]


def test_a_new_run_refuses_to_touch_the_rows_of_an_interrupted_one(output: Path) -> None:
    requests = make_requests(2)
    interrupted_run(output, requests, at="q1")
    with pytest.raises(OutputError, match="1 finished rows of an interrupted run; pass `resume`"):
        run(output, requests)
    assert uuids(journal_of(output)) == ["q0"]


def test_overwriting_keeps_the_old_file_until_the_new_one_is_whole(output: Path) -> None:
    run(output, make_requests(2))
    old = output.read_bytes()
    requests = make_requests(4)
    other = replace(CONFIG, run={"strategy": "prefix_segment"})
    interrupted_run(output, requests, at="q3", config=other, mode="overwrite")
    assert output.read_bytes() == old
    summary = run(output, requests, config=other, mode="resume")
    assert (summary.rows, summary.resumed) == (4, 3)
    assert uuids(output) == ["q0", "q1", "q2", "q3"]


def test_overwriting_starts_again_after_an_interrupted_run(output: Path) -> None:
    interrupted_run(output, make_requests(4), at="q3")
    assert run(output, make_requests(2), mode="overwrite").resumed == 0
    assert uuids(output) == ["q0", "q1"]


def test_overwriting_replaces_a_foreign_file(output: Path) -> None:
    output.parent.mkdir()
    output.write_text("not Arrow")
    journal_of(output).write_text("not Arrow")
    run(output, make_requests(2), mode="overwrite")
    assert uuids(output) == ["q0", "q1"]


def test_resuming_with_nothing_there_simply_starts(output: Path) -> None:
    assert run(output, make_requests(2), mode="resume") == ResultSummary(2, 0, 2, 1)


def test_resuming_a_finished_run_leaves_the_file_alone(output: Path) -> None:
    requests = make_requests(3)
    run(output, requests)
    before = output.stat()
    with ResultWriter.open(output, config=CONFIG, requests=requests, mode="resume") as writer:
        assert list(writer.remaining) == []
        assert writer.summary == ResultSummary(rows=3, resumed=3, judged=2, correct=1)
    after = output.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert os.listdir(output.parent) == ["out.feather"]


def test_resuming_adds_the_requests_that_are_new(output: Path, tmp_path: Path) -> None:
    requests = make_requests(6)
    run(output, requests[2:4])
    interrupted_run(output, requests, at="q5", mode="resume")
    assert sorted(uuids(journal_of(output))) == ["q0", "q1", "q2", "q3", "q4"]
    run(output, requests, mode="resume")
    assert pyarrow.feather.read_table(output).equals(expected_table(requests, tmp_path))


def test_resuming_with_the_requests_reordered_reorders_the_file(output: Path) -> None:
    requests = make_requests(3)
    run(output, requests)
    assert run(output, requests[::-1], mode="resume").resumed == 3
    assert uuids(output) == ["q2", "q1", "q0"]


def test_resuming_with_other_answers_judges_the_finished_rows_again(output: Path) -> None:
    requests = make_requests(3)
    run(output, requests)
    corrected = [requests[0], replace(requests[1], answers=("0",)), requests[2]]
    assert run(output, corrected, mode="resume") == ResultSummary(3, 3, judged=2, correct=2)
    assert read_finished_rows(output)["answers"].to_pylist()[1] == ["0"]
    assert read_finished_rows(output)["correct"].to_pylist() == [True, True, None]


@pytest.mark.parametrize("is_finished", [True, False])
def test_resuming_a_different_run_is_refused_with_the_differences(
    output: Path, is_finished: bool
) -> None:
    requests = make_requests(2)
    run(output, requests) if is_finished else interrupted_run(output, requests, at="q1")
    changed = {"strategy": "prefix_segment", "parameters": {"window": 16}, "max_new_tokens": 10}
    with pytest.raises(OutputError) as raised:
        run(output, requests, mode="resume", config=RunConfig(run={**changed, "seed": 0}))
    assert str(raised.value) == (
        f"{output if is_finished else journal_of(output)}: made by a different run "
        "(strategy: 'causal' → 'prefix_segment'; parameters.window: 8 → 16; "
        "top_p: None → not set; seed: not set → 0); pass `overwrite` to start again, or another "
        "`output`"
    )


def test_resuming_elsewhere_is_allowed_and_recorded(output: Path) -> None:
    requests = make_requests(3)
    interrupted_run(output, requests, at="q1")
    on_gpu = replace(CONFIG, environment={"device": "cuda"})
    interrupted_run(output, requests, at="q2", mode="resume", config=on_gpu)
    run(output, requests, mode="resume")
    config = read_run_config(output)
    assert config.environment == CONFIG.environment
    assert config.earlier_environments == [on_gpu.environment]


def test_weights_are_kept_exactly(output: Path) -> None:
    requests = [replace(request, weights=(0.1, 1 / 3)) for request in make_requests(2)]
    run(output, requests)
    before = output.stat()
    run(output, requests, mode="resume")
    assert output.stat().st_mtime_ns == before.st_mtime_ns
    assert pyarrow.feather.read_table(output)["weights"].to_pylist() == [[0.1, 1 / 3]] * 2


@pytest.mark.parametrize(
    ("name", "segments"), [("each", (1, 2)), ("none", (1,)), ("mean", (None,))]
)
def test_a_fusion_that_chooses_segments_gives_a_row_for_each_of_them(
    output: Path, name: str, segments: tuple[int | None, ...]
) -> None:
    bad = BadRow("bad", "rows.jsonl:3: segment 1 is empty")
    requests: list[Request | BadRow] = [*make_requests(2), bad]
    fusion = Fusion(name)
    with ResultWriter.open(output, config=CONFIG, requests=requests, fusion=fusion) as writer:
        remaining = list(writer.remaining)
        assert [one.key for one in remaining] == [
            (u, s, 0) for u in ("q0", "q1") for s in segments
        ]
        assert len(writer.remaining) == len(remaining)
        assert writer.fusion == (fusion if name == "mean" else Fusion())
        writer.write(map(answer, remaining))
    rows = pyarrow.feather.read_table(output)
    assert rows["uuid"].to_pylist() == [*(one.uuid for one in remaining), "bad"]
    assert rows["segment"].to_pylist() == [*(one.segment for one in remaining), None]


def test_segments_run_alone_have_a_row_each_and_are_resumed_one_by_one(
    output: Path, tmp_path: Path
) -> None:
    requests = [alone for request in make_requests(3) for alone in request.alone()]
    expected = expected_table(requests, tmp_path)
    assert expected["uuid"].to_pylist() == ["q0", "q0", "q1", "q1", "q2", "q2"]
    assert expected["segment"].to_pylist() == [1, 2] * 3
    assert expected["paraphrases"].to_pylist()[1] == ["Q: what is 0?\nA:"]
    with (
        pytest.raises(KeyboardInterrupt),
        ResultWriter.open(output, config=CONFIG, requests=requests) as writer,
    ):
        writer.write([answer(requests[3]), answer(requests[0]), answer(requests[5])])
        raise KeyboardInterrupt
    summary = run(output, requests, mode="resume")
    assert (summary.rows, summary.resumed) == (6, 3)
    assert pyarrow.feather.read_table(output).equals(expected)
    with pytest.raises(OutputError, match=r"no request for \(uuid 'q1' segment 2\)"):
        run(output, [*requests[:3], *requests[4:]], mode="resume")


def test_resuming_without_a_request_that_has_a_row_is_refused(output: Path) -> None:
    run(output, make_requests(6))
    with pytest.raises(OutputError, match=r"no request for \(uuid 'q1', 'q2', 'q3' and 2 more\)"):
        run(output, make_requests(1), mode="resume")


@pytest.mark.parametrize(
    "part",
    [{"prefix": "x"}, {"segments": ("x",)}, {"suffix": "x"}, {"weights": (0.5, 1.0)}],
    ids=lambda part: next(iter(part)),
)
def test_resuming_with_a_changed_request_is_refused(output: Path, part: dict[str, Any]) -> None:
    requests = make_requests(3)
    run(output, requests)
    changed = [requests[0], replace(requests[1], **part), requests[2]]
    with pytest.raises(
        OutputError,
        match=r"the texts, weights or choices of requests have changed since \(uuid 'q1'\)",
    ):
        run(output, changed, mode="resume")


def write_other_columns(path: Path) -> None:
    metadata = {"flexmask": CONFIG.to_json()}
    table = pa.table({"uuid": ["q0"]}).replace_schema_metadata(metadata)
    pyarrow.feather.write_feather(table, path)


def write_start_of_a_result(path: Path) -> None:
    run(path, make_requests(2))
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("uuid,answers\n"), "not a result file"),
        (lambda path: path.write_text(""), "not a result file, no flexmask run is recorded"),
        (
            lambda path: pyarrow.feather.write_feather(pa.table({"uuid": ["q0"]}), path),
            "not a result file, no flexmask run is recorded",
        ),
        (write_other_columns, "its columns are not those that this version writes"),
        (write_start_of_a_result, "damaged, not readable as .feather"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(
    output: Path, write: Callable[[Path], None], message: str
) -> None:
    output.parent.mkdir()
    write(output)
    before = output.read_bytes()
    with pytest.raises(OutputError, match=f"out.feather: {message}"):
        run(output, make_requests(2), mode="resume")
    with pytest.raises(OutputError, match=f"out.feather: {message}"):
        read_finished_rows(output)
    assert output.read_bytes() == before
    assert os.listdir(output.parent) == ["out.feather"]


@pytest.mark.parametrize("mode", ["new", "resume"])
def test_a_file_that_is_not_ours_in_the_journals_place_is_refused(
    output: Path, mode: OutputMode
) -> None:
    output.parent.mkdir()
    journal_of(output).write_text("half a download")
    with pytest.raises(
        OutputError,
        match=r"out.feather.partial: not a result file; pass `overwrite` to start again",
    ):
        run(output, make_requests(2), mode=mode)
    assert journal_of(output).read_text() == "half a download"


def test_a_second_run_on_the_same_output_is_refused(output: Path) -> None:
    requests = make_requests(2)
    with ResultWriter.open(output, config=CONFIG, requests=requests) as writer:
        modes: tuple[OutputMode, ...] = ("new", "resume", "overwrite")
        for mode in modes:
            for attempt in (lambda m: run(output, requests, m), lambda m: check_output(output, m)):
                with pytest.raises(OutputError, match=r"out\.feather: another process is writing"):
                    attempt(mode)
        writer.write(map(answer, requests))
    assert uuids(output) == ["q0", "q1"]


def test_the_lock_ends_with_the_process(output: Path) -> None:
    requests = make_requests(2)
    with as_program("hold", output) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "holding\n"
        with pytest.raises(OutputError, match="another process is writing it; wait until it ends"):
            run(output, requests, mode="resume")
        program.kill()
    assert run(output, requests, mode="resume").resumed == 1


def test_a_lock_on_a_journal_that_was_replaced_meanwhile_does_not_count(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(3)
    interrupted_run(output, requests, at="q2")
    flock = fcntl.flock

    def let_another_in_then_lock(fd: int, operation: int) -> None:
        monkeypatch.undo()
        others.append(ResultWriter.open(output, config=CONFIG, requests=requests, mode="resume"))
        flock(fd, operation)

    others: list[ResultWriter] = []
    monkeypatch.setattr(fcntl, "flock", let_another_in_then_lock)
    with pytest.raises(OutputError, match="another process is writing it"):
        run(output, requests, mode="resume")
    with others[0] as other:
        other.write(map(answer, other.remaining))
    assert uuids(output) == ["q0", "q1", "q2"]


def test_a_run_killed_at_any_system_call_can_be_resumed(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with as_program("kill_at_each_system_call", tmp_path) as program:
        printed, _ = program.communicate()
    assert program.returncode == 0
    assert int(printed) > 40, "kills"
    record_property("cases", int(printed))


def test_a_run_killed_at_random_moments_equals_an_undisturbed_one(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with as_program("kill_at_random", tmp_path) as program:
        printed, _ = program.communicate()
    assert program.returncode == 0
    assert int(printed) >= 3, "kills"
    record_property("cases", int(printed))


def as_program(name: str, path: Path) -> subprocess.Popen[str]:
    search_path = str(Path(flexmask.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, __file__, name, str(path)],
        env={**os.environ, "PYTHONPATH": search_path},
        stdout=subprocess.PIPE,
        text=True,
    )


def hold(output: Path) -> None:
    with ResultWriter.open(output, config=CONFIG, requests=make_requests(2)) as writer:
        writer.write([answer(next(iter(writer.remaining)))])
        print("holding", flush=True)
        time.sleep(600)


def kill_at_each_system_call(folder: Path) -> None:
    """Runs die before each call that changes the disk, and half-way through each write."""
    requests = make_requests(3)
    in_child(expected_table, requests, folder)
    beginnings: dict[str, tuple[OutputMode, Callable[..., object]]] = {
        "nothing": ("new", lambda output: None),
        "a part": ("resume", lambda output: write_and_log(output, requests[1:2], "new")),
        "an old result": ("overwrite", lambda output: write_and_log(output, requests[:1], "new")),
        "a cut journal": ("resume", leave_cut_journal),
    }
    kills = 0
    for name, (mode, begin) in beginnings.items():
        for call in itertools.count():
            output = folder / name / str(call) / "out.feather"
            in_child(begin, output)
            if in_child(run_and_die, output, requests, mode, call) == 0:
                break
            kills += 1
            assert output.exists() or mode != "overwrite"
            in_child(check_and_resume, output, requests, folder)
    print(kills)


def leave_cut_journal(output: Path) -> None:
    requests = make_requests(3)
    try:
        run(output, requests, stop_before="q2")
    except KeyboardInterrupt:
        content = journal_of(output).read_bytes()
        journal_of(output).write_bytes(content[:-5])
        log_of(output).write_text("q0\n")


def run_and_die(output: Path, requests: Sequence[Request], mode: OutputMode, call: int) -> None:
    calls = itertools.count()

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                if function is write:
                    write(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    write = os.write
    for name in ("write", "fsync", "replace", "unlink", "ftruncate", "open"):
        setattr(os, name, dying(getattr(os, name)))
    write_and_log(output, requests, mode)


def write_and_log(
    output: Path, requests: Sequence[Request], mode: OutputMode, pause_s: float = 0.0
) -> None:
    """Like `run`; notes each row whose writing was over."""
    with ResultWriter.open(output, config=CONFIG, requests=requests, mode=mode) as writer:
        for request in writer.remaining:
            writer.write([answer(request)])
            with log_of(output).open("a") as log:
                log.write(f"{request.uuid}\n")
            time.sleep(pause_s)


def log_of(output: Path) -> Path:
    return output.parent.with_suffix(".written")


def check_and_resume(output: Path, requests: Sequence[Request], folder: Path) -> None:
    check_rows(output, folder)
    run(output, requests, "resume")
    expected = pyarrow.feather.read_table(folder / "undisturbed.feather")
    assert pyarrow.feather.read_table(output).equals(expected, check_metadata=True)
    assert os.listdir(output.parent) == ["out.feather"]


def check_rows(output: Path, folder: Path) -> None:
    """What stands there is right, and no row is lost whose writing was over."""
    expected = pyarrow.feather.read_table(folder / "undisturbed.feather")
    found: list[dict[str, Any]] = []
    for path in (output, journal_of(output)):
        if path.exists() and path.stat().st_size:
            found += read_finished_rows(path).to_pylist()
    assert all(row in expected.to_pylist() for row in found)
    if log_of(output).exists():
        assert {row["uuid"] for row in found} >= set(log_of(output).read_text().split())


def kill_at_random(folder: Path) -> None:
    requests = make_requests(40)
    in_child(expected_table, requests, folder)
    kills = 0
    for seed in range(3):
        output = folder / str(seed) / "out.feather"
        generator = random.Random(seed)
        status = -1
        while status:
            life_s = generator.uniform(0.005, 0.05) + kills / 1000  # on a slow machine too it ends
            status = in_child(
                *(write_and_log, output, requests, "resume", 0.002), killed_after_s=life_s
            )
            kills += status != 0
            in_child(check_rows, output, folder)
        in_child(check_and_resume, output, requests, folder)
    print(kills)


def in_child(
    work: Callable[..., object], *arguments: object, killed_after_s: float | None = None
) -> int:
    """Fork, so that Python starts once; returns the exit status, negative if killed."""
    child = os.fork()
    if not child:
        try:
            work(*arguments)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    if killed_after_s is not None:
        time.sleep(killed_after_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status


@pytest.mark.parametrize("name", ["out.feather", "out.arrow", "deep/er/out.feather"])
@pytest.mark.parametrize("mode", ["new", "overwrite", "resume"])
def test_a_place_that_can_be_written_passes(tmp_path: Path, name: str, mode: OutputMode) -> None:
    check_output(tmp_path / name, mode)
    assert (tmp_path / name).parent.is_dir()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "folder: a folder; name a file in it: .*results.feather"),
        ("out.csv", "unknown extension '.csv'; name it .feather, .arrow, .parquet, .jsonl"),
        ("out", "unknown extension ''"),
        ("file/out.feather", "file: nothing can be written there .*; choose another `output`"),
        ("x" * 250 + ".feather", r"cannot be opened and locked \(File name too long\)"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=message) as raised:
        check_output(tmp_path / name, "new")
    assert "\n" not in str(raised.value)


@pytest.fixture
def foreign_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not even look into."""
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    folder.chmod(0o700)


@pytest.mark.parametrize("name", ["out.feather", "outputs/out.feather"])
def test_another_users_folder_is_refused(foreign_folder: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"nothing can be written there \(Permission denied\)"):
        check_output(foreign_folder / name, "new")


def test_conflicts_are_found_without_a_run(output: Path) -> None:
    interrupted_run(output, make_requests(2), at="q1")
    content = journal_of(output).read_bytes()
    with pytest.raises(OutputError, match="holds 1 finished rows"):
        check_output(output, "new")
    check_output(output, "resume")
    check_output(output, "overwrite")
    assert journal_of(output).read_bytes() == content


def test_a_missing_file_cannot_be_read(output: Path) -> None:
    with pytest.raises(OutputError, match=r"out\.feather: cannot be read \(No such file"):
        read_finished_rows(output)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("questions", "meta-llama/Llama-3.2-3B-Instruct", "causal", 5),
            "outputs/questions/Llama-3.2-3B-Instruct/causal-5.feather",
        ),
        (("stdin", "./models/mine/", "causal", None), "outputs/stdin/mine/causal-all.feather"),
        (("squad-1.1", "m", "my strategy/é", 1), "outputs/squad-1.1/m/my_strategy_é-1.feather"),
        (("..", "/", "..", None), "outputs/_/_/_-all.feather"),
        (("a b:c", "..", "x", 2), "outputs/a_b_c/_/x-2.feather"),
        (("q", "m", "causal", 3, "attention"), "outputs/q/m/causal-3.feather"),
        (("q", "m", "causal", 3, "mean"), "outputs/q/m/causal-mean-3.feather"),
    ],
)
def test_default_paths_are_safe(
    arguments: tuple[str, str, str, int | None, str], expected: str
) -> None:
    assert str(default_output_path(*arguments)) == expected


if __name__ == "__main__":
    pa.array([[None]])  # imports pandas here, once, and not in every child
    globals()[sys.argv[1]](Path(sys.argv[2]))
