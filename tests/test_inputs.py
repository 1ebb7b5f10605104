"""Rows of every kind of input. Run as a program, this file reads an input for the tests."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

import flexmask
from flexmask.dataset.inputs import open_input
from flexmask.dataset.requests import BadRow, PlainRequests, RequestSource, read_requests
from flexmask.dataset.rows import Row
from flexmask.errors import OptionError, RequestError
from flexmask.fusion import Fusion
from flexmask.request import Request

ROWS: list[dict[str, Any]] = [
    {"uuid": "a", "segments": ["Où?", "Q,\n2"], "suffix": "\nA:", "answers": ["x", "y"]},
    {"uuid": "b", "segments": ["one"], "suffix": None, "answers": None},
    {"uuid": "c", "segments": ['"quoted"'], "suffix": "→", "answers": []},
]
TABLE = pa.Table.from_pylist(ROWS)


def write_json_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_csv(path: Path) -> None:
    cells = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in ROWS]
    pyarrow.csv.write_csv(pa.Table.from_pylist(cells), path)


def write_csv_with_python_lists(path: Path) -> None:
    cells = [{k: str(v) if isinstance(v, list) else v for k, v in r.items()} for r in ROWS]
    options = pyarrow.csv.WriteOptions(delimiter="\t")
    pyarrow.csv.write_csv(pa.Table.from_pylist(cells), path, write_options=options)


def write_arrow_stream(path: Path) -> None:
    with pa.ipc.new_stream(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=2)


WRITERS = {
    "rows.jsonl": write_json_lines,
    "rows.csv": write_csv,
    "rows.tsv": write_csv_with_python_lists,
    "rows.parquet": lambda path: pyarrow.parquet.write_table(TABLE, path, row_group_size=2),
    "rows.feather": lambda path: pyarrow.feather.write_feather(TABLE, path, chunksize=2),
    "rows.arrow": write_arrow_stream,
    "extension.of.no.kind": lambda path: pyarrow.parquet.write_table(TABLE, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_requests(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    requests = read_requests(str(path))
    assert requests == [
        Request(
            uuid=row["uuid"],
            segments=tuple(row["segments"]),
            suffix=row["suffix"] or "",
            answers=tuple(row["answers"] or ()),
        )
        for row in ROWS
    ]
    line = 2 if name in ("rows.csv", "rows.tsv") else 1
    assert requests[0].source == f"{path}:{line}"
    source = open_input(str(path))
    assert [row.values for row in source] == [row.values for row in source]


def test_a_saved_data_set_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder, num_shards=2)
    assert [request.uuid for request in read_requests(str(folder))] == ["a", "b", "c"]
    assert open_input(str(folder)).stem == "saved"


def test_a_split_of_a_saved_data_set_is_named_after_a_colon(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "one")
    assert len(read_requests(str(tmp_path / "one"))) == 1
    splits["test"] = datasets.Dataset.from_list(ROWS[1:])
    folder = tmp_path / "two"
    datasets.DatasetDict(splits).save_to_disk(folder)
    test = open_input(f"{folder}:test")
    assert [row.values["uuid"] for row in test] == ["b", "c"]
    assert test.split_of is not None
    assert [row.values["uuid"] for row in test.split_of("train")] == ["a"]
    with pytest.raises(RequestError, match="which split\\? name one as .*:SPLIT, of train, test"):
        open_input(str(folder))
    with pytest.raises(RequestError, match="it has no split 'dev'; name one as .*:SPLIT"):
        open_input(f"{folder}:dev")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """A hub with one data set of two splits; lists what was asked of it."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str | None, streaming: bool) -> Any:
        asked.append((name, config, split))
        assert streaming
        if name != "owner/name":
            raise datasets.exceptions.DatasetNotFoundError(f"{name} does not exist")
        splits = {
            key: datasets.Dataset.from_list(rows).to_iterable_dataset()
            for key, rows in {"train": ROWS[:1], "test": ROWS[1:]}.items()
        }
        return splits[split] if split else datasets.IterableDatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    yield asked


def test_a_hub_id_streams_a_split(hub: list[tuple[Any, ...]]) -> None:
    source = open_input("owner/name:default:test")
    for _ in range(2):
        assert [row.values["uuid"] for row in source] == ["b", "c"]
    assert source.stem == "name"
    assert source.split_of is not None
    assert [row.values["uuid"] for row in source.split_of("train")] == ["a"]
    assert hub == [("owner/name", "default", "test"), ("owner/name", "default", "train")]


def test_a_hub_id_without_a_split_names_the_splits(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(RequestError, match="which split\\? name one as owner/name:SPLIT, of tr"):
        open_input("owner/name")
    with pytest.raises(RequestError, match="owner/other: no such file, nor a data set: owner/oth"):
        open_input("owner/other")


def test_a_hub_id_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=r"pip install 'flexmask\[datasets\]'"):
        open_input("owner/name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"PAR1 and then nothing", "damaged, or of an unknown kind"),
        ("x.feather", b"ARROW1 and then nothing", "damaged, or of an unknown kind"),
        ("x.jsonl", b"\xfe\xff", "not UTF-8 text"),
        ("x.csv", b"segments\n\xfe\xff", "not UTF-8 text"),
        ("x.csv", b"", "no rows in it"),
        ("x.csv", b"a,b,a\n1,2,3\n", ":1: a column stands twice: a, b, a"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as raised:
        read_requests(str(path))
    assert str(raised.value).startswith(str(path))


CSV = """uuid,segments,answers
good,Q: one?,x
short
long,Q: two?,x,y

"list","[""Q: three?"", ""Q: four?""]","['x', 'y']"
broken,"['Q: five?'",x
"many
lines",Q: [MASK] six?,
"""


def test_csv_rows_that_do_not_fit_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(CSV)
    good, short, long, listed, broken, many = open_input(str(path))
    assert good.values == {"uuid": "good", "segments": "Q: one?", "answers": "x"}
    assert (short.where, short.error) == (f"{path}:3", "not CSV (1 cells under 3 columns)")
    assert (long.where, long.error) == (f"{path}:4", "not CSV (4 cells under 3 columns)")
    assert listed.values["segments"] == ["Q: three?", "Q: four?"]
    assert listed.values["answers"] == ["x", "y"]
    assert "a cell begins like a list and is none" in broken.error
    assert many.values == {"uuid": "many\nlines", "segments": "Q: [MASK] six?", "answers": None}
    assert [row.number for row in (good, short, long, listed, broken, many)] == [1, 2, 3, 4, 5, 6]


def source_of(path: Path, *lines: str, **options: Any) -> RequestSource:
    path.write_text("".join(line + "\n" for line in lines))
    return RequestSource(open_input(str(path)), **options)


LINES = (
    '{"uuid": "a", "segments": ["x"]}',
    "{broken",
    '{"uuid": "a", "segments": ["y"]}',
    '{"uuid": "d", "segments": []}',
    '{"uuid": "e", "segments": ["x", "y"]}',
)


def test_bad_rows_are_skipped_and_none_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good, broken, twice, empty, last = source_of(path, *LINES, on_error="skip")
    assert [good.uuid, last.uuid] == ["a", "e"]
    assert isinstance(broken, BadRow) and broken.uuid == f"{path}:2"
    assert isinstance(twice, BadRow) and twice.uuid == f"{path}:3"
    assert twice.error == f"{path}:3: uuid 'a' already stands in row 1; give each its own"
    assert empty == BadRow("d", f"{path}:4: segments must hold at least one text, got none")


def test_an_input_of_bad_rows_only_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no row can be used; the first: .*:1: segments must"):
        list(source_of(tmp_path / "rows.jsonl", LINES[3], LINES[1], on_error="skip"))


def test_a_limit_stops_the_reading(tmp_path: Path) -> None:
    requests = list(source_of(tmp_path / "rows.jsonl", *LINES, limit=1))
    assert [request.uuid for request in requests] == ["a"]


def test_columns_are_read_from_others() -> None:
    make = PlainRequests({"segments": ("q0", "q1", "q2"), "answers": ("label",)}, prefix="P ")
    values = {"q0": "x", "q1": None, "q2": "z", "label": "w", "prefix": "not this"}
    request = make(Row("r:7", 7, values))
    assert request == Request(("x", "z"), prefix="P ", answers=("w",), uuid="7")
    with pytest.raises(RequestError, match="no column 'label' for answers; its columns: 'q0'"):
        make(Row("r:1", 1, {"q0": "x", "q1": "y", "q2": "z"}))
    with pytest.raises(OptionError, match="no column 'question' to be read from another"):
        PlainRequests({"question": ("q0",)})


BY_COLUMN = Fusion("weighted_mean", "column")


@pytest.mark.parametrize("value", [[0.5, 2], ["0.5", "2"], "[0.5, 2]", (0.5, 2.0)])
def test_weights_are_numbers_or_text_of_numbers(value: Any) -> None:
    values = {"segments": ["x", "y"], "weights": value}
    assert PlainRequests(reads_weights=True)(Row("r:1", 1, values)).weights == (0.5, 2.0)
    assert PlainRequests()(Row("r:1", 1, values)).weights == ()


def test_weights_are_read_from_a_column_for_each_segment() -> None:
    make = PlainRequests({"weights": ("w0", "w1")}, reads_weights=True)
    row = Row("r:1", 1, {"segments": ["x", "y"], "w0": "1", "w1": "0"})
    assert make(row).weights == (1.0, 0.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("null", "fusion 'weighted_mean' by column needs weights, a number for each segment"),
        ("[]", "fusion 'weighted_mean' by column needs weights, a number for each segment"),
        ("[1]", "weights must be a number for each of the 2 segments, got 1"),
        ("1", "weights must be a number for each of the 2 segments, got 1"),
        ("[1, -0.5]", "weight 2 must be 0 or more and finite, got -0.5"),
        ("[NaN, 1]", "weight 1 must be 0 or more and finite, got nan"),
        ("[0, 0]", "one of the weights must be more than 0"),
        ('["1", "much"]', "weights must be a list of numbers, got ['1', 'much']"),
        ("[true, 1]", "weights must be a list of numbers, got [True, 1]"),
        (f"[1{'0' * 400}, 1]", f"weights must be a list of numbers, got [1{'0' * 38}"),
        ("{}", "weights must be a list of numbers, got {}"),
        ('"1 2"', "weights must be a list of numbers, got '1 2'"),
    ],
)
def test_weights_that_are_none_are_named(tmp_path: Path, weights: str, message: str) -> None:
    line = f'{{"segments": ["x", "y"], "weights": {weights}}}'
    make = PlainRequests(reads_weights=True)
    source = source_of(tmp_path / "rows.jsonl", line, make=make, fusion=BY_COLUMN)
    with pytest.raises(RequestError) as raised:
        list(source)
    assert str(raised.value) == f"{tmp_path / 'rows.jsonl'}:1: {message}"


def test_segments_left_out_leave_out_their_weights(tmp_path: Path) -> None:
    line = '{"segments": ["x", "y", "z"], "weights": [3, 2, 1]}'
    make = PlainRequests(reads_weights=True)
    options = {"make": make, "fusion": BY_COLUMN, "num_segments": 2}
    (request,) = source_of(tmp_path / "rows.jsonl", line, **options)
    assert isinstance(request, Request)
    assert (request.segments, request.weights) == (("x", "y"), (3.0, 2.0))


def test_a_row_gives_a_request_for_each_segment_where_each_runs_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = list(source_of(path, *LINES, LINES[4], on_error="skip", fusion=Fusion("each")))
    assert [row.key for row in rows] == [
        *(("a", 1), (f"{path}:2", None), (f"{path}:3", None), ("d", None)),
        *(("e", 1), ("e", 2), (f"{path}:6", None)),
    ]
    first = source_of(path, *LINES, on_error="skip", fusion=Fusion("none"))
    assert [row.key for row in first if isinstance(row, Request)] == [("a", 1), ("e", 1)]


@pytest.mark.parametrize("name", ["million.parquet", "million.jsonl"])
def test_the_first_of_a_million_rows_come_at_once_and_in_little_memory(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    count = 1_000_000
    if name.endswith(".parquet"):
        numbers = pa.array(range(count)).cast(pa.string())
        table = pa.table({"uuid": numbers, "segments": numbers})
        pyarrow.parquet.write_table(table, path, row_group_size=count)
    else:
        with path.open("w") as file:
            file.writelines(f'{{"uuid": "{n}", "segments": ["{n}"]}}\n' for n in range(count))
    seconds, mebibytes, rows = read_in_a_process(path, 1000)
    assert rows == 1000
    assert seconds < 1
    assert mebibytes < 200


def read_in_a_process(path: Path, limit: int) -> tuple[float, float, int]:
    """Seconds, peak of memory over that of the imports in MiB, and number of requests."""
    search_path = str(Path(flexmask.__file__).parents[1])
    printed = subprocess.run(
        [sys.executable, __file__, str(path), str(limit)],
        env={**os.environ, "PYTHONPATH": search_path},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    seconds, mebibytes, rows = json.loads(printed)
    return seconds, mebibytes, rows


def main(path: str, limit: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    rows = sum(1 for _ in RequestSource(open_input(path), limit=limit))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([seconds, (peak - before) / 1024, rows]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
