"""An input in shards: each row in one of them, and merged as one process writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.feather
import pyarrow.parquet
import pytest

from command import Outcome, run_command
from flexmask.errors import OptionError, RequestError
from flexmask.inputs.input_files import open_input
from flexmask.results.merge import merge
from flexmask.results.result_writer import read_run_config
from flexmask.tasks.input_survey import survey
from flexmask.tasks.request_source import RequestSource
from flexmask.tasks.shards import Shard
from flexmask_cli import planned_run
from quick_cli import QuickEngine

Generate = Callable[..., Outcome]

ROWS: list[dict[str, Any]] = [
    {"uuid": "a", "segments": ["x"], "answers": ["1"]},
    {"segments": ["no uuid"]},
    {"uuid": "c"},  # no segments
    {"uuid": "d", "segments": ["x", "y"], "answers": ["4"]},
    {"uuid": "a", "segments": ["the first row's uuid"]},
    {"uuid": "f", "segments": ["x", "y"]},
    {"uuid": "c", "segments": ["the uuid of a bad row"]},
    {"uuid": "h", "segments": ["x"], "answers": ["8"]},
]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generate:
    """Runs ``flexmask generate`` without a model over `ROWS`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planned_run, "load_engine", lambda *_, **__: QuickEngine())
    Path("rows.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)) + "\n")

    def run(*options: object) -> Outcome:
        command = ("generate", "--input", "rows.jsonl", "--device", "cpu", "--quiet")
        return run_command(*command, "--on-error", "skip", *options)

    return run


def write_parts(generate: Generate, count: int, *options: object) -> list[str]:
    """Generate all shards; return their files, the last shard's first."""
    for number in range(1, count + 1):
        shard = ("--shard", f"{number}/{count}", "--output", f"{number}.feather")
        done = generate(*shard, *options)
        assert done.status == 0, done.err
    return [f"{number}.feather" for number in range(count, 0, -1)]


@pytest.mark.parametrize("num_rows", [0, 1, 7, 64])
def test_every_row_is_in_one_shard_and_shards_differ_by_one_row(num_rows: int) -> None:
    for count in (1, 3, 10):
        rows = [Shard(number, count).rows(num_rows) for number in range(1, count + 1)]
        assert [row for each in rows for row in each] == [*range(num_rows)]
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


@pytest.mark.parametrize(
    "text", ["0/3", "4/3", "3", "1/0", "-1/2", "1/2/3", "a/b", "1/99999999999"]
)
def test_a_shard_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="a shard is i/n with i from 1 to n"):
        Shard.parse(text)


@pytest.mark.parametrize("name", ["rows.csv", "rows.feather", "rows.parquet", "rows.jsonl"])
def test_shards_read_the_requests_that_one_process_reads(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = [{"uuid": f"u{n}", "segments": f"text {n}"} for n in range(1200)]
    if name == "rows.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name == "rows.csv":
        path.write_text("uuid,segments\n" + "".join(f"u{n},text {n}\n" for n in range(1200)))
    else:
        table = pyarrow.Table.from_pylist(rows)
        if name == "rows.feather":
            pyarrow.feather.write_feather(table, path, chunksize=500)
        else:
            pyarrow.parquet.write_table(table, path)
    source = RequestSource(open_input(str(path)), limit=1100)
    found = survey(source)
    parts = [RequestSource(source.rows, part=found.part(Shard(n, 7))) for n in range(1, 8)]
    read = [request for part in parts for request in part]
    whole = list(source)
    assert read == whole
    assert [one.source for one in read] == [one.source for one in whole]  # type: ignore[union-attr]


SAMPLED = ["--samples", 2, "--temperature", 1]


@pytest.mark.parametrize("options", [[], ["--fusion", "each"], ["--limit", 6], SAMPLED])
def test_merged_shards_are_the_bytes_that_one_process_writes(
    generate: Generate, options: list[object]
) -> None:
    assert generate("--output", "whole.feather", *options).status == 0
    parts = write_parts(generate, 3, *options)
    assert read_run_config(parts[0]).shard is not None
    for name in ("merged.feather", "merged.jsonl"):
        done = run_command("merge", *parts, "--output", name)
        assert done.status == 0, done.err
    assert done.out.endswith("rows in merged.jsonl\n")
    assert Path("merged.feather").read_bytes() == Path("whole.feather").read_bytes()
    assert generate("--output", "whole.jsonl", *options).status == 0
    assert Path("merged.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert Path("merged.run.json").read_bytes() == Path("whole.run.json").read_bytes()
    figures = run_command("merge", *parts, "--output", "merged.feather", "--overwrite", "--json")
    assert json.loads(figures.out)["failed"] == (2 if options[:1] == ["--limit"] else 3)


@pytest.mark.parametrize("options", [[], SAMPLED])
def test_more_shards_than_rows_leave_some_empty(generate: Generate, options: list[object]) -> None:
    assert generate("--output", "whole.parquet", *options).status == 0
    parts = write_parts(generate, len(ROWS) + 3, *options)
    last = ("--shard", f"{len(parts)}/{len(parts)}", "--output", "last.jsonl")
    assert generate(*last, *options).status == 0
    parts[0] = "last.jsonl"
    assert run_command("merge", *parts, "--output", "merged.parquet").status == 0
    assert Path("merged.parquet").read_bytes() == Path("whole.parquet").read_bytes()


def test_without_skipping_a_uuid_of_another_shard_is_refused(generate: Generate) -> None:
    refused = generate("--on-error", "stop", "--shard", "3/4", "--output", "3.feather")
    assert "rows.jsonl:9: uuid 'a' is already used by row 1" in refused.error


def test_parts_that_do_not_belong_together_are_refused(generate: Generate) -> None:
    first, second, third = reversed(write_parts(generate, 3))

    def error(*parts: str) -> str:
        return run_command("merge", *parts, "--output", "merged.feather").error

    assert "1 of 3 shards are missing: 2/3 (rows 3 to 5)" in error(first, third)
    assert "2 of 3 shards are missing: 1/3 (rows 1 to 2), 3/3 (rows 6 to 8)" in error(second)
    Path("copy.feather").write_bytes(Path(second).read_bytes())
    assert "copy.feather: shard 2/3, and so is 2.feather" in error(
        first, second, third, "copy.feather"
    )
    options = ("--shard", "2/3", "--output", "other.feather")
    assert generate(*options, "--max-new-tokens", 3).status == 0
    assert "other.feather: of another configuration than 1.feather (max_new_tokens: 20 → 3)" in (
        error(first, "other.feather", third)
    )
    assert generate("--shard", "2/4", "--output", "quarter.feather").status == 0
    assert "of another input than 1.feather (shards: 3 → 4)" in error(first, "quarter.feather")
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[::-1])))
    assert generate(*options, "--overwrite").status == 0
    assert "of another input than 1.feather (input_digest: " in error(first, "other.feather")
    assert generate("--output", "whole.feather").status == 0
    assert "whole.feather: the result of a whole input, not of a --shard" in error("whole.feather")
    assert not Path("merged.feather").exists()


def test_a_part_that_is_unfinished_or_has_lost_rows_is_refused(generate: Generate) -> None:
    first, second = reversed(write_parts(generate, 2))
    os.rename(second, f"{second}.partial")
    error = run_command("merge", first, second, "--output", "merged.jsonl").error
    assert "2.feather: its run is not finished" in error
    assert generate("--shard", "2/2", "--output", "2.jsonl").status == 0
    lines = Path("2.jsonl").read_text().splitlines(keepends=True)
    Path("2.jsonl").write_text("".join(lines[:-1]))
    error = run_command("merge", first, "2.jsonl", "--output", "merged.jsonl").error
    assert "2.jsonl: has 3 rows, but its run wrote 4" in error
    Path("2.jsonl").write_text("".join(lines)[:-20])
    error = run_command("merge", first, "2.jsonl", "--output", "merged.jsonl").error
    assert "2.jsonl: damaged" in error
    assert not Path("merged.jsonl").exists()
    assert not list(Path().glob("*.tmp"))


def test_an_output_is_replaced_only_if_asked_and_never_a_part(generate: Generate) -> None:
    parts = write_parts(generate, 2)
    Path("merged.feather").write_text("mine")
    error = run_command("merge", *parts, "--output", "merged.feather").error
    assert "merged.feather: exists; pass --overwrite" in error
    assert Path("merged.feather").read_text() == "mine"
    error = run_command("merge", *parts, "--output", parts[0], "--overwrite").error
    assert "2.feather: one of the parts" in error


def test_a_shard_resumes_as_itself_only(generate: Generate) -> None:
    write_parts(generate, 2)
    again = generate("--shard", "1/2", "--output", "1.feather", "--resume")
    assert again.status == 0, again.err
    error = generate("--shard", "2/2", "--output", "1.feather", "--resume").error
    assert "shard.number: 1 → 2" in error
    error = generate("--output", "1.feather", "--resume").error
    assert "shard.number: 1 → not set" in error


def test_parts_of_several_machines_name_each_environment_once(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, device in enumerate(["cpu", "cuda", "cuda", "cpu"], start=1):
        machine = {"device": device}
        monkeypatch.setattr(planned_run.PlannedRun, "machine", lambda _, it=machine: it)
        assert generate("--shard", f"{number}/4", "--output", f"{number}.feather").status == 0
    merge([Path(f"{number}.feather") for number in range(1, 5)], Path("merged.feather"))
    config = read_run_config("merged.feather")
    assert config.environment["device"] == "cpu"
    assert [one["device"] for one in config.earlier_environments] == ["cuda"]


def test_an_input_that_shrinks_between_survey_and_run_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"segments": ["x"]}\n' * 4)
    source = RequestSource(open_input(str(path)))
    part = survey(source).part(Shard(2, 2))
    path.write_text('{"segments": ["x"]}\n' * 3)
    with pytest.raises(RequestError, match="the input changed while it was read"):
        list(RequestSource(source.rows, part=part))
