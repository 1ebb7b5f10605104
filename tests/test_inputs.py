"""Rows of every kind of input. Run as a program, this file reads an input for the tests."""

from __future__ import annotations

import csv
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

import flexmask
from flexmask.errors import OptionError, RequestError
from flexmask.fusion import Fusion
from flexmask.inputs.input_files import open_input
from flexmask.inputs.rows import Row
from flexmask.request import Request
from flexmask.tasks.request_source import BadRow, PlainRequests, RequestSource, read_requests

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
    with pytest.raises(RequestError, match=r"which split\? name one as .*:SPLIT, of train, test"):
        open_input(str(folder))
    with pytest.raises(RequestError, match=r"it has no split 'dev'; name one as .*:SPLIT"):
        open_input(f"{folder}:dev")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with one data set of two splits; lists what was asked of it."""
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []

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
    return asked


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
        ("x.csv", b"a,b,a\n1,2,3\n", ":1: a column occurs twice: a, b, a"),
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
    assert broken.error == ""
    with pytest.raises(RequestError, match="a cell begins like a list but is not"):
        broken.values["segments"]
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
    assert isinstance(broken, BadRow)
    assert broken.uuid == f"{path}:2"
    assert isinstance(twice, BadRow)
    assert twice.uuid == f"{path}:3"
    assert twice.error == f"{path}:3: uuid 'a' is already used by row 1; each row needs its own"
    assert empty == BadRow("d", f"{path}:4: segments must hold at least one text, got none")


def test_an_input_of_bad_rows_only_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no row can be used; the first: .*:1: segments must"):
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


def csv_request(path: Path, header: str, *cells: str) -> Request:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), cells])
    (request,) = read_requests(str(path))
    return request


def test_lists_that_numpy_printed_are_read_from_csv(tmp_path: Path) -> None:
    table = pandas.DataFrame(
        {"segments": [np.array(["Where?", "It's where?"])], "answers": [np.array([1912, 1913])]}
    )
    table.to_csv(tmp_path / "rows.csv", index=False)
    (request,) = read_requests(str(tmp_path / "rows.csv"))
    assert (request.segments, request.answers) == (("Where?", "It's where?"), ("1912", "1913"))


def test_a_list_that_cannot_be_read_is_refused_by_row(tmp_path: Path) -> None:
    for cell in ("[London, Londres]", "['it's', 'b']"):
        with pytest.raises(RequestError, match=r"rows.csv:2: a cell begins like a list but is"):
            csv_request(tmp_path / "rows.csv", "segments,answers", "Q?", cell)


def test_texts_in_brackets_and_columns_that_nobody_uses_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    odd = ("['it's', 'b']", '["a", "b"]', "[[1], [2]]")
    request = csv_request(path, "segments,prefix,suffix,note", "[MASK] is [1].", *odd)
    assert (request.segments, request.prefix, request.suffix) == (("[MASK] is [1].",), *odd[:2])


def test_null_is_left_out_of_a_list_at_any_index(tmp_path: Path) -> None:
    lists = {"segments": ["x", None, "y"], "answers": [None, "z"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(lists))
    pyarrow.parquet.write_table(pa.Table.from_pylist([lists]), tmp_path / "a.parquet")
    expected = Request(("x", "y"), answers=("z",), uuid="1")
    for name in ("a.jsonl", "a.parquet"):
        assert read_requests(str(tmp_path / name)) == [expected]
    for printed in (str, json.dumps):
        cells = [printed(items) for items in lists.values()]
        assert csv_request(tmp_path / "a.csv", "segments,answers", *cells) == expected
    make = PlainRequests({"segments": ("a", "b", "c"), "answers": ("d", "e")})
    values = {"a": "x", "b": None, "c": "y", "d": None, "e": "z"}
    assert make(Row("r:1", 1, values)) == expected


def test_weights_stay_with_their_texts_where_some_are_null() -> None:
    make = PlainRequests({"segments": ("a", "b"), "weights": ("v", "w")}, reads_weights=True)
    values = {"a": None, "b": "y", "v": None, "w": 2}
    assert make(Row("r:1", 1, values)).weights == (2.0,)
    with pytest.raises(RequestError, match="must be null exactly where the texts"):
        make(Row("r:1", 1, values | {"v": 1, "w": None}))


def test_whole_numbers_are_answers_and_others_are_not() -> None:
    make = PlainRequests()
    answers = [1912, 3.0, Decimal("7.00"), "x"]
    assert make(Row("r", 1, {"segments": "?", "answers": answers})).answers == (
        "1912",
        "3",
        "7",
        "x",
    )
    assert make(Row("r", 1, {"segments": "?", "answers": 12})).answers == ("12",)
    for wrong in (1.5, True, Decimal("NaN")):
        with pytest.raises(RequestError, match="answers must be a list of strings, got"):
            make(Row("r", 1, {"segments": "?", "answers": [wrong]}))


ODD_COLUMNS = {
    "late": pa.array([2 * 253402300800000000], pa.timestamp("us")),
    "early": pa.array([-(10**14)], pa.timestamp("s")),
    "day": pa.array([10**9], pa.int32()).cast(pa.date32()),
    "long": pa.array([9 * 10**18], pa.duration("s")),
    "mars": pa.array([0], pa.timestamp("us", tz="Mars/Phobos")),
    "twins": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]),
    "bytes": pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")]
    ),
}


@pytest.mark.parametrize("name", ODD_COLUMNS)
@pytest.mark.parametrize("write", [pyarrow.feather.write_feather, pyarrow.parquet.write_table])
def test_odd_values_harm_those_rows_alone_that_use_them(
    tmp_path: Path, name: str, write: Callable[..., None]
) -> None:
    path = tmp_path / "rows"
    write(pa.table({"uuid": ["a"], "segments": [["Q"]], name: ODD_COLUMNS[name]}), str(path))
    assert read_requests(str(path)) == [Request(("Q",), uuid="a")]
    used = RequestSource(open_input(str(path)), PlainRequests({"answers": (name,)}))
    with pytest.raises(RequestError, match=f":1: the column '{name}' holds a .* cannot be read"):
        list(used)


def test_an_odd_value_leaves_the_other_rows_of_its_column_alone(tmp_path: Path) -> None:
    days = pa.array([0, 10**9], pa.int32()).cast(pa.date32())
    pyarrow.feather.write_feather(pa.table({"day": days}), str(tmp_path / "rows"))
    first, second = open_input(str(tmp_path / "rows"))
    assert str(first.values["day"]) == "1970-01-01"
    with pytest.raises(RequestError, match="the column 'day' holds a date32"):
        second.values["day"]


def test_a_column_of_type_uuid_gives_uuids(tmp_path: Path) -> None:
    stored = pa.array([bytes(range(16))], pa.binary(16))
    table = pa.table(
        {"uuid": pa.ExtensionArray.from_storage(pa.uuid(), stored), "segments": ["Q"]}
    )
    pyarrow.feather.write_feather(table, str(tmp_path / "a.feather"))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", store_schema=False)
    names = ["a.feather", "a.parquet"]
    if "arrow_extensions_enabled" in signature(pyarrow.parquet.ParquetFile).parameters:
        names.append("b.parquet")
    for name in names:
        (request,) = read_requests(str(tmp_path / name))
        assert request.uuid == "00010203-0405-0607-0809-0a0b0c0d0e0f"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_the_delimiter_is_detected(tmp_path: Path, name: str, delimiter: str) -> None:
    path = tmp_path / name
    lines = [("uuid", "segments", "note"), ("a", "one; two, three\tfour", "x")]
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(lines)
    assert read_requests(str(path)) == [Request(("one; two, three\tfour",), uuid="a")]


def test_one_column_needs_no_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("segments\nWho; what?\n")
    assert read_requests(str(path))[0].segments == ("Who; what?",)


def test_an_ambiguous_delimiter_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("segments;a,b\nx;y,z\n")
    both = "`encoding` sets .* and `delimiter` the character between"
    with pytest.raises(RequestError, match=f"separated by commas or semicolons; {both}"):
        read_requests(str(path))
    assert read_requests(str(path), delimiter=";")[0].segments == ("x",)
    path.write_text("segments|answers\nx|y\n")
    with pytest.raises(RequestError, match=f"its columns: 'segments.answers'; {both}"):
        read_requests(str(path))
    assert read_requests(str(path), delimiter="|")[0].answers == ("y",)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-8", "latin-1"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_text_file_is_read_in_the_encoding_that_is_given(
    tmp_path: Path, name: str, encoding: str
) -> None:
    path = tmp_path / name
    text = (
        "segments,answers\nOù?,é\n"
        if name == "rows.csv"
        else '{"segments": "Où?", "answers": "é"}'
    )
    path.write_text(text, encoding=encoding)
    (request,) = read_requests(str(path), encoding=encoding)
    assert (request.segments, request.answers) == (("Où?",), ("é",))
    if encoding != "utf-8":
        with pytest.raises(RequestError, match=r"`encoding` sets .* and `delimiter`|not JSON"):
            read_requests(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "utf-32768"}, "the encoding must be one that Python knows, such as cp1252"),
        ({"encoding": "base64"}, "the encoding must be one that Python knows"),
        ({"delimiter": ""}, "the delimiter must be one character, such as ;"),
        ({"delimiter": ";;"}, "the delimiter must be one character"),
        ({"delimiter": '"'}, "the delimiter must be one character"),
    ],
)
def test_an_encoding_or_delimiter_that_is_none_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        read_requests(str(tmp_path / "rows.csv"), **options)


def test_a_file_that_is_no_text_takes_no_encoding(tmp_path: Path) -> None:
    WRITERS["rows.parquet"](tmp_path / "rows.parquet")
    with pytest.raises(RequestError, match="not a text file; leave out `delimiter` and `enco"):
        read_requests(str(tmp_path / "rows.parquet"), encoding="cp1252")


LINE = '{"segments": ["x"], "note": "' + "y" * 200 + '"}\n'


def test_a_pipe_is_read_once_and_loses_nothing() -> None:
    read, write = os.pipe()
    with ThreadPoolExecutor(1) as pool, os.fdopen(write, "w") as file:

        def fill() -> None:
            file.write(LINE * 1000)
            file.close()

        written = pool.submit(fill)
        source = RequestSource(open_input(f"/dev/fd/{read}"))
        assert [len(list(source)) for _ in range(2)] == [1000, 1000]
        written.result()
    os.close(read)


def test_what_can_be_read_only_once_or_for_ever_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for path in (tmp_path / "fifo", tmp_path / "zero.csv"):
        with pytest.raises(RequestError, match=r"not a file but a pipe or device; .*`input=-`"):
            read_requests(str(path))


def test_nested_lists_of_any_depth_are_one_line(tmp_path: Path) -> None:
    for depth in (200, 2_000, 100_000):
        nested = "[" * depth + "]" * depth
        (tmp_path / "deep.jsonl").write_text(f'{{"segments": ["x"], "more": {nested}}}\n')
        with pytest.raises(
            RequestError, match=r"JSON (nested more than 100 levels deep|that Python cannot)"
        ):
            read_requests(str(tmp_path / "deep.jsonl"))
        request = csv_request(tmp_path / "deep.csv", "segments,more", "x", nested)
        assert request.segments == ("x",)


def test_a_prompt_longer_than_any_model_takes_is_refused_before_it_is_tokenized(
    tmp_path: Path,
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"segments": ["x" * 10_000_000]}))
    with pytest.raises(RequestError, match="has 10,000,000 characters, more than any model takes"):
        read_requests(str(tmp_path / "long.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", "[]", "state.json: not what the datasets library writes, it has no list"),
        ("state.json", '{"_data_files": {"a": 1}}', "it has no list '_data_files'"),
        ("state.json", '{"_data_files": ["a"]}', "does not list the names of data files"),
        ("state.json", '{"_data_files": [{"filename": 3}]}', "does not list the names of data fi"),
        (
            "state.json",
            '{"_data_files": [{"filename": "../x.arrow"}]}',
            "not list the names of da",
        ),
        ("state.json", '{"_data_files": [{"filename": "no.arrow"}]}', "no.arrow: .*No such file"),
        ("state.json", "[" * 100_000, "state.json: not what the datasets library writes"),
        ("dataset_dict.json", '{"splits": "train"}', "dataset_dict.json: not what the datasets"),
        ("dataset_dict.json", '{"splits": [3]}', "does not list the names of splits"),
        ("dataset_dict.json", None, "dataset_dict.json: not a regular file; save the folder"),
    ],
)
def test_an_odd_folder_of_a_saved_data_set_is_named(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=message) as raised:
        read_requests(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_file_whose_name_is_not_utf_8_is_read_and_named(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        WRITERS[name](tmp_path / name)
        odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff" + name.encode())
        (tmp_path / name).rename(odd)
        first, *_ = read_requests(odd)
        assert f"\\udcff{name}:" in first.source, write


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


@pytest.mark.parametrize("name", ["million.parquet", "million.jsonl"])
def test_the_first_of_a_million_rows_take_little_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    count = 1_000_000
    if name.endswith(".parquet"):
        numbers = pa.array(range(count)).cast(pa.string())
        table = pa.table({"uuid": numbers, "segments": numbers})
        pyarrow.parquet.write_table(table, path, row_group_size=count)
    else:
        with path.open("w") as file:
            file.writelines(f'{{"uuid": "{n}", "segments": ["{n}"]}}\n' for n in range(count))
    mebibytes, rows = read_in_a_process(path, 1000)
    assert rows == 1000
    assert mebibytes < 200


def read_in_a_process(path: Path, limit: int) -> tuple[float, int]:
    """Peak of memory over that of the imports in MiB, and number of requests."""
    search_path = str(Path(flexmask.__file__).parents[1])
    printed = subprocess.run(
        [sys.executable, __file__, str(path), str(limit)],
        env={**os.environ, "PYTHONPATH": search_path},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    mebibytes, rows = json.loads(printed)
    return mebibytes, rows


def main(path: str, limit: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = sum(1 for _ in RequestSource(open_input(path), limit=limit))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([(peak - before) / 1024, rows]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
