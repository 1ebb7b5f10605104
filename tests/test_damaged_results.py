"""Result files that are damaged, or that somebody has edited: refused in a line, never a fault."""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pytest

from damage import DAMAGES
from flexmask.errors import FlexMaskError, OutputError
from flexmask.results.batch_checksum import checksum
from flexmask.results.evaluation import evaluate
from flexmask.results.formats import EXTENSIONS
from flexmask.results.result_writer import read_finished_rows
from flexmask.results.run_config import RunConfig
from flexmask.show.picture_source import subject_of_result
from flexmask_cli.app import main
from result_runs import make_requests, run

RUN = {"strategy": "causal", "parameters": {}, "model": "demo", "chat_template": False}
CONFIG = RunConfig(run=RUN)


@pytest.fixture(params=EXTENSIONS)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"out{request.param}"
    run(path, make_requests(6), config=CONFIG)
    return path


def test_no_damage_to_a_result_ends_in_a_traceback(output: Path) -> None:
    files = [output, output.with_suffix(".run.json")]
    files = [file for file in files if file.exists()]
    refused = 0
    for case in range(64):
        file, generator = files[case % len(files)], random.Random(case)
        whole = file.read_bytes()
        content = bytearray(whole)
        DAMAGES[case // 2 % len(DAMAGES)](content, generator)
        file.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                evaluate(output, ["exact"])
            except FlexMaskError:
                refused += 1
            try:
                subject_of_result(str(output), 1)
            except FlexMaskError:
                refused += 1
        file.write_bytes(whole)
    assert refused > 60


@pytest.mark.parametrize("extension", [".feather", ".arrow", ".parquet"])
def test_no_bit_of_a_result_changes_a_row_unnoticed(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"out{extension}"
    run(path, make_requests(6), config=CONFIG)
    whole, right = path.read_bytes(), read_finished_rows(path)
    generator = random.Random(0)
    refused = 0
    for bit in generator.sample(range(len(whole) * 8), 400):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            assert read_finished_rows(path).equals(right)
        except OutputError:
            refused += 1
    assert refused > 200


def test_rows_that_somebody_filters_are_still_a_result(tmp_path: Path) -> None:
    path = tmp_path / "out.feather"
    run(path, make_requests(6), config=CONFIG)
    table = pyarrow.feather.read_table(path)
    pyarrow.feather.write_feather(table.slice(2, 3), path)
    assert read_finished_rows(path)["uuid"].to_pylist() == ["q2", "q3", "q4"]


def test_a_checksum_is_of_values_and_not_of_buffers(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"a": None, "b": ["x", None, "é"], "c": 1.5, "d": True},
        {"a": "long text", "b": None, "c": None, "d": None},
        {"a": "", "b": [], "c": 0.1, "d": False},
    ]
    schema = pa.schema(
        {"a": pa.string(), "b": pa.list_(pa.string()), "c": pa.float64(), "d": pa.bool_()}
    )
    whole = pa.RecordBatch.from_pylist(rows * 3, schema=schema)
    sliced = pa.RecordBatch.from_pylist([rows[2], *rows * 3], schema=schema).slice(1)
    assert checksum(sliced) == checksum(whole)
    changed: list[dict[str, Any]] = [
        {"a": "x"},
        {"b": ["x", None]},
        {"b": ["x", None, "e"]},
        {"c": -1.5},
        {"d": None},
    ]
    others = [pa.RecordBatch.from_pylist([rows[0] | c], schema=schema) for c in changed]
    first = pa.RecordBatch.from_pylist(rows[:1], schema=schema)
    assert len({checksum(batch) for batch in [first, *others]}) == len(changed) + 1


@pytest.fixture
def error_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    def get(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["flexmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, str)
        assert end.value.code.startswith("error: ")
        assert "\n" not in end.value.code
        return end.value.code

    return get


def test_two_columns_of_one_name_are_no_result(
    tmp_path: Path, error_of: Callable[..., str]
) -> None:
    path = tmp_path / "out.feather"
    run(path, make_requests(2), config=CONFIG)
    table = pyarrow.feather.read_table(path)
    for columns in (table.append_column("uuid", table["uuid"]), table.rename_columns(["a"] * 20)):
        columns = columns.replace_schema_metadata(table.schema.metadata)
        with pa.ipc.new_file(str(path), columns.schema) as writer:
            writer.write_table(columns)
        for command in ("eval", "show"):
            assert "its columns are not those that this version writes" in error_of(command, path)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("uuid", None),
        ("answers", None),
        ("answers", [None]),
        ("paraphrases", None),
        ("paraphrases", ["x", None]),
        ("prediction", None),
        ("prefix", None),
        ("finish_reason", None),
    ],
)
def test_an_empty_place_is_named(
    tmp_path: Path, error_of: Callable[..., str], column: str, value: Any
) -> None:
    path = edited(tmp_path, lambda row: row | {column: value})
    for command in ("eval", "show"):
        assert f"damaged, its column '{column}' has nulls" in error_of(command, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generated_tokens": -4}, "damaged, row 1 has -4 generated tokens"),
        ({"generated_tokens": 2**31 - 1}, "damaged, row 1 has 2147483647 generated tokens"),
        ({"paraphrases": []}, "segments"),
        ({"uuid": 7}, "damaged, not readable as .jsonl"),
        ({"more": 7}, "its columns are not those that this version writes"),
    ],
)
def test_a_row_that_no_run_makes_is_refused(
    tmp_path: Path, error_of: Callable[..., str], change: dict[str, Any], message: str
) -> None:
    assert message in error_of("show", edited(tmp_path, lambda row: row | change))


@pytest.mark.parametrize("content", ["[1]\n", '"text"\n', "{}\n", "[" * 100_000, "\xff", "\0"])
def test_lines_that_are_no_rows_are_refused(
    tmp_path: Path, error_of: Callable[..., str], content: str
) -> None:
    path = edited(tmp_path, lambda row: row)
    path.write_text(content, encoding="latin-1")
    for command in ("eval", "show"):
        error_of(command, path)


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"run": [], "environment": {}, "earlier_environments": []}',
        '{"run": {}, "environment": 7, "earlier_environments": []}',
        '{"run": {}, "environment": {}, "earlier_environments": null}',
    ],
)
def test_a_record_that_is_none_is_refused(
    tmp_path: Path, error_of: Callable[..., str], record: str
) -> None:
    path = edited(tmp_path, lambda row: row)
    path.with_suffix(".run.json").write_text(record)
    for command in ("eval", "show"):
        assert "no flexmask run is recorded in it" in error_of(command, path)


@pytest.mark.parametrize("key", [*RUN, "fusion"])
def test_a_run_that_records_something_else_is_named(
    tmp_path: Path, error_of: Callable[..., str], key: str
) -> None:
    path = edited(tmp_path, lambda row: row)
    changed = replace(CONFIG, run=RUN | {key: 7})
    path.with_suffix(".run.json").write_text(changed.to_json())
    assert f"its run does not record {key}" in error_of("show", path)


def edited(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A result file of which somebody has edited every row."""
    path = folder / "out.jsonl"
    run(path, make_requests(2), config=CONFIG)
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_no_file_is_refused(tmp_path: Path, error_of: Callable[..., str]) -> None:
    (tmp_path / "folder.feather").mkdir()
    for name in ("folder.feather", "nowhere.feather", "nowhere.parquet", "nowhere.jsonl"):
        error_of("eval", tmp_path / name)
        error_of("show", tmp_path / name)
    with pytest.raises(OutputError):
        read_finished_rows(tmp_path / "nowhere.feather")
