"""Result files in three formats, with rows that failed, and on disks that are full."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from flexmask.errors import OutputError
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.results.formats import EXTENSIONS
from flexmask.results.result_writer import ResultWriter, read_finished_rows, read_run_config
from flexmask.results.run_config import RunConfig
from flexmask.tasks.judge import Judge
from flexmask.tasks.request_source import BadRow

CONFIG = RunConfig({"strategy": "causal", "task": {"name": "t", "select": "first 2"}})
REQUESTS = [
    Request(
        uuid=f"q{n}",
        prefix="Réponds.\n\n",
        segments=(f"{n}?", f"what is {n}?"),
        answers=() if n % 3 == 2 else (str(n), "é"),
        weights=(0.1, 1 / 3) if n == 1 else (),
    )
    for n in range(7)
]
REQUESTS += REQUESTS.pop().alone()
BAD = BadRow("bad", "rows.jsonl:3: segment 1 is empty")


def answer(request: Request) -> Generation:
    return Generation(request, f" {request.uuid[1:]}\nmore", (1, 2), "length", 9)


def write(path: Path, requests: Any = REQUESTS, stop_before: str = "", **options: Any) -> None:
    with ResultWriter.open(path, config=CONFIG, requests=requests, **options) as writer:
        for request in writer.remaining:
            if request.uuid == stop_before:
                raise KeyboardInterrupt
            writer.write([answer(request)])


@pytest.fixture(params=EXTENSIONS)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"out{request.param}"


def test_every_format_holds_the_same_rows_and_the_run(output: Path, tmp_path: Path) -> None:
    write(tmp_path / "reference.feather")
    write(output, mode="overwrite")
    assert read_finished_rows(output).equals(
        pyarrow.feather.read_table(tmp_path / "reference.feather"), check_metadata=True
    )
    assert read_run_config(output).run == CONFIG.run


def test_every_format_is_resumed(output: Path, tmp_path: Path) -> None:
    write(tmp_path / "reference.feather")
    write(output, REQUESTS[:2])
    with pytest.raises(KeyboardInterrupt):
        write(output, stop_before="q5", mode="resume")
    write(output, mode="resume")
    reference = pyarrow.feather.read_table(tmp_path / "reference.feather")
    assert read_finished_rows(output).equals(reference)
    before = output.stat()
    write(output, mode="resume")
    assert output.stat().st_mtime_ns == before.st_mtime_ns
    beside = ["out.run.json"] if output.suffix == ".jsonl" else []
    assert sorted(os.listdir(tmp_path)) == sorted([output.name, "reference.feather", *beside])


def test_every_format_refuses_another_run_with_the_differences(output: Path) -> None:
    write(output)
    config = RunConfig({"strategy": "causal", "task": {"name": "t", "select": "all"}})
    with pytest.raises(OutputError, match=r"run .task.select: 'first 2' → 'all'.; pass `over"):
        ResultWriter.open(output, config=config, requests=REQUESTS, mode="resume")


def test_every_format_that_is_damaged_is_refused(output: Path) -> None:
    write(output)
    output.write_bytes(output.read_bytes()[:-100])
    with pytest.raises(OutputError, match=f"damaged, not readable as {output.suffix}"):
        read_finished_rows(output)


def test_json_lines_without_the_file_beside_it_are_not_a_result(tmp_path: Path) -> None:
    write(tmp_path / "out.jsonl")
    (tmp_path / "out.run.json").unlink()
    with pytest.raises(OutputError, match="no flexmask run is recorded"):
        read_finished_rows(tmp_path / "out.jsonl")


def read_with_pandas(path: Path) -> list[dict[str, Any]]:
    pandas = pytest.importorskip("pandas")
    readers = {".parquet": pandas.read_parquet, ".jsonl": read_json_lines_with(pandas.read_json)}
    frame = readers.get(path.suffix, pandas.read_feather)(path)
    rows: list[dict[str, Any]] = frame.to_dict("records")
    return rows


def read_json_lines_with(read_json: Callable[..., Any]) -> Callable[..., Any]:
    return lambda path: read_json(path, lines=True)


def read_with_polars(path: Path) -> list[dict[str, Any]]:
    polars = pytest.importorskip("polars")
    readers = {".parquet": polars.read_parquet, ".jsonl": polars.read_ndjson}
    rows: list[dict[str, Any]] = readers.get(path.suffix, polars.read_ipc)(path).to_dicts()
    return rows


def read_with_duckdb(path: Path) -> list[dict[str, Any]]:
    duckdb = pytest.importorskip("duckdb")
    if path.suffix in (".feather", ".arrow"):
        found = duckdb.from_arrow(pyarrow.feather.read_table(path))
    else:
        found = duckdb.sql(f"select * from '{path}'")
    return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]


@pytest.mark.parametrize("read", [read_with_pandas, read_with_polars, read_with_duckdb])
def test_other_libraries_read_every_format(
    output: Path, read: Callable[[Path], list[dict[str, Any]]]
) -> None:
    write(output)
    rows = read(output)
    for request, row in zip(REQUESTS, rows, strict=True):
        assert row["uuid"] == request.uuid
        assert tuple(row["answers"]) == request.answers
        assert tuple(row["paraphrases"]) == request.segments
        assert row["prediction"] == request.uuid[1:] or int(row["prediction"]) >= 0
        assert row["generation"] == f" {request.uuid[1:]}\nmore"
    assert len(rows) == len(REQUESTS)


def test_a_json_line_is_a_row(tmp_path: Path) -> None:
    write(tmp_path / "out.jsonl")
    first, *_ = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(first) == {
        "uuid": "q0",
        "answers": ["0", "é"],
        "paraphrases": ["0?", "what is 0?"],
        "prediction": "0",
        "generation": " 0\nmore",
        "prefix": "Réponds.\n\n",
        "suffix": "",
        "system": "",
        "messages": [],
        "answer_prefix": "",
        "segment_turns": "one",
        "prompts": None,
        "segment": None,
        "weights": None,
        "prompt_tokens": 9,
        "generated_tokens": 2,
        "finish_reason": "length",
        "correct": True,
        "score": 1.0,
        "error": None,
    }


def test_rows_that_failed_stand_in_their_place_with_the_reason(output: Path) -> None:
    requests: list[Request | BadRow] = [*REQUESTS[:2], BAD, *REQUESTS[2:]]
    with ResultWriter.open(output, config=CONFIG, requests=requests) as writer:
        assert [request.uuid for request in writer.remaining] == [r.uuid for r in REQUESTS]
        assert len(writer.remaining) == len(REQUESTS)
        refused = BadRow("q0", "rows.jsonl:1: needs positions up to 9", REQUESTS[0])
        writer.write([refused, *map(answer, REQUESTS[1:])])
        assert writer.summary.failed == 2
    rows = read_finished_rows(output).to_pylist()
    assert [row["uuid"] for row in rows] == [*"q0 q1 bad q2 q3 q4 q5 q6 q6".split()]
    first, _, bad, *_ = rows
    assert (first["finish_reason"], first["error"]) == ("error", refused.error)
    assert (first["correct"], first["score"], first["paraphrases"]) == (
        False,
        0,
        ["0?", "what is 0?"],
    )
    assert (bad["finish_reason"], bad["error"], bad["correct"]) == ("error", BAD.error, None)
    assert [row["error"] for row in rows].count(None) == len(REQUESTS) - 1


def test_rows_that_failed_are_tried_again_by_a_resumed_run(output: Path) -> None:
    requests: list[Request | BadRow] = [*REQUESTS[:2], BAD]
    with ResultWriter.open(output, config=CONFIG, requests=requests) as writer:
        writer.write([BadRow("q0", "too long", REQUESTS[0]), answer(REQUESTS[1])])
    mended = [*REQUESTS[:2], Request(uuid="bad", segments=("0?",))]
    with ResultWriter.open(output, config=CONFIG, requests=mended, mode="resume") as writer:
        assert [request.uuid for request in writer.remaining] == ["q0", "bad"]
        assert (writer.summary.rows, writer.summary.failed) == (1, 0)
        writer.write([answer(REQUESTS[0]), Generation(mended[2], "fine", (1,), "eos", 3)])
    table = read_finished_rows(output)
    assert table["uuid"].to_pylist() == ["q0", "q1", "bad"]
    assert table["error"].null_count == 3


def test_the_judge_cuts_and_scores_what_is_written(tmp_path: Path) -> None:
    request = Request(uuid="q", segments=("?",), answers=("one two",))
    with ResultWriter.open(
        tmp_path / "out.parquet", config=CONFIG, requests=[request], judge=Judge("all", "f1")
    ) as writer:
        writer.write([Generation(request, " one\nthree", (1,), "eos", 3)])
    (row,) = read_finished_rows(tmp_path / "out.parquet").to_pylist()
    assert (row["prediction"], row["correct"], row["score"]) == ("one\nthree", False, 0.5)


def test_an_input_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    requests = REQUESTS[:2]
    with (
        pytest.raises(Exception, match="the input changed while it was read: uuid 'q2' is"),
        ResultWriter.open(tmp_path / "o.feather", config=CONFIG, requests=requests) as writer,
    ):
        requests.append(REQUESTS[2])
        list(writer.remaining)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_disk_that_is_really_full_costs_no_finished_row(
    small_disk: Path, tmp_path: Path, extension: str
) -> None:
    output = small_disk / f"out{extension}"
    requests = [
        Request(uuid=str(n), prefix=os.urandom(5000).hex(), segments=(f"{n}?",)) for n in range(40)
    ]
    with pytest.raises(OutputError, match=r"No space left on device.; finished rows are kept"):
        write(output, requests)
    kept = read_finished_rows(output.with_name(output.name + ".partial"))["uuid"].to_pylist()
    assert kept == [str(n) for n in range(len(kept))]
    assert 5 < len(kept) < 40
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    write(output, requests, mode="resume")
    write(tmp_path / output.name, requests)
    assert read_finished_rows(output).equals(read_finished_rows(tmp_path / output.name))
    assert not list(small_disk.glob("*.partial"))
    assert not list(small_disk.glob("*.tmp"))


def test_a_large_result_is_put_in_order(tmp_path: Path) -> None:
    """More rows than are sliced at a time, in batches that lie across each other."""
    requests = [Request(uuid=str(n), segments=("?",)) for n in range(10_000)]
    batches = [requests[start::7] for start in range(7)]
    with ResultWriter.open(tmp_path / "o.feather", config=CONFIG, requests=requests) as writer:
        for batch in batches:
            writer.write([Generation(r, r.uuid, (), "eos", 1) for r in batch])
    table = pa.ipc.open_file(str(tmp_path / "o.feather")).read_all()
    assert table["prediction"].to_pylist() == [request.uuid for request in requests]
