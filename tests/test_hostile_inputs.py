"""Files that are odd, damaged or made to do harm, as inputs: right rows, or one line."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from command import run_command
from flexmask.errors import RequestError
from flexmask.tasks.request_source import read_requests
from sampling_of_cases import sampled

Content = bytes | str | Callable[[], bytes]

TOUCH = "touch PWNED"
NESTED = "[" * 99 + "1" + "]" * 99
X = [("x",)]
TABLE = pa.table({"uuid": ["a", "b"], "segments": [["x"], ["y"]], "answers": [["1"], ["2"]]})


def row(**values: Any) -> str:
    return json.dumps({"segments": ["x"], **values}) + "\n"


def feather(table: pa.Table = TABLE, **options: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.feather.write_feather(table, file, **options)
    return file.getvalue()


def parquet(table: pa.Table = TABLE) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def stream(table: pa.Table = TABLE) -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def column(values: Any, name: str = "segments") -> bytes:
    return stream(pa.table({name: values}))


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", row())
    return file.getvalue()


def with_offsets(first: int, last: int, *, of_list: bool) -> bytes:
    """A stream of one text, or list, whose offsets say that it lies elsewhere."""
    content = column([["x"] * 7777] if of_list else ["x" * 7777])
    place = content.rfind(struct.pack("<ii", 0, 7777))
    return content[:place] + struct.pack("<ii", first, last) + content[place + 8 :]


def flipped(content: bytes, seed: int) -> bytes:
    """Content of which some bits, after the magic number, are others."""
    generator, changed = random.Random(seed), bytearray(content)
    for _ in range(4):
        changed[generator.randrange(8, len(content))] ^= 1 << generator.randrange(8)
    return bytes(changed)


JSON_LINES: dict[str, tuple[Content, Any]] = {
    "zeros": (b"\0" * 100, "not JSON"),
    "a zero in a text": (b'{"segments": ["x\0y"]}', "not JSON .Invalid control character"),
    "an escaped zero": ('{"segments": ["x\\u0000y"]}', [("x\0y",)]),
    "a bell": (b'{"segments": ["\7"]}', "not JSON .Invalid control character"),
    "a key twice": ('{"segments": ["y"], "segments": ["x"]}', X),
    "NaN as an answer": ('{"segments": ["x"], "answers": [NaN]}', "got a number as item 1"),
    "1e400 as an answer": ('{"segments": ["x"], "answers": [1e400]}', "got a number as item 1"),
    "NaN as uuid": ('{"segments": ["x"], "uuid": NaN}', "uuid must be a string or an integer"),
    "two objects in a line": (row().strip() * 2, "not JSON .Extra data at column 20"),
    "a comma after a row": ('{"segments": ["x"]},\n', "not JSON .Extra data"),
    "carriage returns": (row().replace("\n", "\r") * 2, X * 2),
    "separators of lines in a text": (
        '{"segments": ["a\x85b\u2028c"]}',
        [("a\x85b\u2028c",)],
    ),
    "UTF-16": (row().encode("utf-16"), "not UTF-8 text .*encoding. sets an"),
    "UTF-32": (row().encode("utf-32"), "not UTF-8 text"),
    "UTF-7": ('{"segments": ["+AOk-"]}', [("+AOk-",)]),
    "an overlong slash": (b'{"segments": ["\xc0\xaf"]}', "not UTF-8 text"),
    "half a pair in bytes": (b'{"segments": ["\xed\xa0\x80"]}', "not UTF-8 text"),
    "two marks of byte order": (b"\xef\xbb\xbf" * 2 + row().encode(), X),
    "a mark in the middle": (row() + "\ufeff" + row(), ":2: not JSON .Unexpected UTF-8 BOM"),
    "gzip": (gzip.compress(row().encode()), "not UTF-8 text"),
    "zip": (zipped, "not UTF-8 text|not JSON"),
    "a page": ("<!DOCTYPE html><script>alert(1)</script>", ":1: not JSON"),
    "a pickle": (f"cos\nsystem\n(S'{TOUCH}'\ntR.", ":1: not JSON"),
    "an LFS pointer": ("version https://git-lfs.github.com/spec/v1\n", ":1: not JSON"),
    "an array": ('[{"segments": ["x"]}]', "a JSON array; expected JSON Lines"),
    "an object over several lines": (json.dumps({"segments": ["x"]}, indent=1), ":1: not JSON"),
    "blank lines": ("\n\n \t\n", "no rows in it"),
    "empty objects": ("{}\n{}\n", "the row has no 'segments'.*; its columns: none"),
    "an integer of 400 digits as uuid": (f'{{"segments": ["x"], "uuid": 1{"0" * 400}}}', X),
    "an integer of 5000 digits": (f'{{"a": 1{"0" * 5000}}}', "JSON that Python cannot read"),
    "names of attributes": (row(__class__="y", __dict__={}), X),
    "100,000 columns": (json.dumps({f"c{n}": n for n in range(100_000)}), "'c0', 'c1', .* … "),
    "a name of a megabyte": (json.dumps({"c" * 10**6: 1}), "the row has no 'segments'.* … "),
    "a uuid of a megabyte twice": (row(uuid="u" * 10**6) * 2, "is already used by row 1"),
    "a uuid that a row number is": (row(uuid="2") + row(), "uuid '2' is already used by row 1"),
    "100,000 segments": (json.dumps({"segments": ["x"] * 10**5}), [("x",) * 10**5]),
    "wide spaces": ('{"segments": ["\u3000\u2003"]}', "segment 1 is empty"),
    "lists in a list": ('{"segments": [["x"]]}', "got an array as item 1"),
    "half a pair as uuid": (row(uuid="\ud800"), "uuid holds .*, half of a surrogate pair"),
    "99 lists in a column that nobody uses": (f'{{"segments": "x", "a": {NESTED}}}', X),
    "101 lists": (f'{{"segments": "x", "a": [[{NESTED}]]}}', "nested more than 100 levels deep"),
    "escapes of a terminal": (row(uuid="\x1b[2J", segments=3), "must be a list of strings"),
    "an open brace": ("{", "not JSON"),
}

CSV: dict[str, tuple[Content, Any]] = {
    "a formula": ("segments\n\"=cmd|'/c calc'!A0\"\n", [("=cmd|'/c calc'!A0",)]),
    "a quote that nothing ends": ('segments\n"x\n', ":2: not CSV .unexpected end"),
    "text after a quote": ('segments\n"x"y\n', ":2: not CSV .',' expected after"),
    "quotes within a text": ('segments\nx"y"z\n', [('x"y"z',)]),
    "a zero": ("segments\nx\0y\n", [("x\0y",)]),
    "carriage returns": ("segments,uuid\rx,a\rx,b\r", X * 2),
    "a header alone": ("segments\n", "no rows in it"),
    "blank lines first": ("\n\nsegments\nx\n", "not CSV .1 cells under 0 columns"),
    "two columns without a name": ("segments,,\nx,1,2\n", "a column occurs twice"),
    "a hint for Excel": ("sep=;\nsegments;uuid\nx;a\n", "its columns: 'sep=', ''"),
    "a quote alone": ('"', ":1: not CSV .unexpected end"),
    "two million lines in a cell": (
        lambda: b'segments\n"' + b"x\n" * 2_000_000 + b'"\n',
        [("x\n" * 2_000_000,)],
    ),
    "a cell of nine million characters": (
        lambda: b"segments\n" + b"x" * 9_000_000,
        "has 9,000,000 characters, more than any model takes",
    ),
    "100,000 columns": (
        ",".join(f"c{n}" for n in range(100_000)) + "\n" + "1," * 99_999 + "1\n",
        "the row has no 'segments'.* … ",
    ),
    "a column 100,000 times": ("c," * 99_999 + "c\n1\n", "a column occurs twice: c, c, .* … "),
    "a list that is code": (
        f"segments\n\"[__import__('os').system('{TOUCH}')]\"\n",
        [(f"[__import__('os').system('{TOUCH}')]",)],
    ),
    "a list with a sum": ("segments\n\"['a' + 'b']\"\n", "begins like a list but is not one"),
    "5,000 brackets": ("segments\n" + "[" * 5000, [("[" * 5000,)]),
    "a list of 50,000 items and no end": ("segments\n\"['" + "a' 'a" * 50_000 + '"\n', "list"),
    "a million backslashes": ("segments\n\"['" + "\\" * 10**6 + '"\n', [("['" + "\\" * 10**6,)]),
    "a list of a huge integer": (f'segments\n"[1{"0" * 5000}]"\n', "begins like a list"),
    "half a pair in a list": ("segments\n\"['\\ud800']\"\n", "half of a surrogate pair"),
    "an empty list": ("segments\n[]\n", "segments must hold at least one text"),
    "a list of an empty text": ("segments\n\"['']\"\n", "segment 1 is empty"),
    "a list that numpy left things out of": ("segments\n\"['a' ... 'b']\"\n", "like a list"),
    "Latin-1": ("segments\nOù\n".encode("latin-1"), "not UTF-8 text"),
    "UTF-16": ("segments\nx\n".encode("utf-16"), "not UTF-8 text"),
    "a uuid twice": ("uuid,segments\na,x\na,y\n", ":3: uuid 'a' is already used by row 1"),
    "spaces around names": (" segments ,uuid\nx,a\n", "its columns: ' segments ', 'uuid'"),
    "capitals": ("Segments\nx\n", "its columns: 'Segments'"),
}

DAMAGED = "damaged, or of an unknown kind"
UNREADABLE = "the column 'segments' holds a .* that cannot be read"


def cut(whole: Callable[[], bytes], length: int) -> Callable[[], bytes]:
    return lambda: whole()[:length]


BINARY: dict[str, tuple[Content, Any]] = {
    **{f"Parquet cut at {n}": (cut(parquet, n), DAMAGED) for n in (4, 8, 50, 600)},
    **{f"Feather cut at {n}": (cut(feather, n), DAMAGED) for n in (6, 8, 50, 600)},
    **{f"stream cut at {n}": (cut(stream, n), DAMAGED) for n in (4, 8, 50, 500)},
    "Parquet without its last byte": (lambda: parquet()[:-1], DAMAGED),
    "Feather without its last byte": (lambda: feather()[:-1], DAMAGED),
    "a footer of 2 GiB": (lambda: parquet()[:-8] + b"\xff\xff\xff\x7fPAR1", DAMAGED),
    "a footer of -1 bytes": (lambda: parquet()[:-8] + b"\xff\xff\xff\xffPAR1", DAMAGED),
    "an encrypted footer": (lambda: parquet()[:-4] + b"PARE", DAMAGED),
    "a schema of 2 GiB": (b"\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(99), DAMAGED),
    "a schema of -5 bytes": (b"\xff\xff\xff\xff\xfb\xff\xff\xff" + bytes(99), DAMAGED),
    "a schema of no bytes": (b"\xff\xff\xff\xff\0\0\0\0", DAMAGED),
    "Feather of version 1": (b"FEA1" + bytes(99), "not JSON"),
    "Feather twice": (lambda: feather() * 2, [("x",), ("y",)]),
    "no rows": (lambda: feather(TABLE.slice(0, 0)), "no rows in it"),
    "no columns": (lambda: feather(pa.table({})), "no rows in it"),
    "numbers": (lambda: column([1]), "must be a list of strings, got a number"),
    "bytes": (lambda: column([b"\xff"]), "must be a list of strings, got bytes"),
    "structs": (lambda: column([[{"a": "x"}]]), "got an object as item 1"),
    "a map": (
        lambda: column(pa.array([[("a", "x")]], pa.map_(pa.string(), pa.string()))),
        "tuple",
    ),
    "nulls": (lambda: column(pa.nulls(2)), "the row has no 'segments'"),
    "a dictionary": (lambda: column(pa.array(["x"]).dictionary_encode()), X),
    "views": (lambda: column(pa.array(["x"], pa.string_view())), X),
    "large lists": (lambda: column(pa.array([["x"]], pa.large_list(pa.large_string()))), X),
    "lists of one length": (lambda: column(pa.array([["x"]], pa.list_(pa.string(), 1))), X),
    "runs": (
        lambda: column(pa.RunEndEncodedArray.from_arrays([2], ["x"])),  # type: ignore[call-overload]
        X * 2,
    ),
    "metadata that is no JSON": (
        lambda: feather(TABLE.replace_schema_metadata({"pandas": "{", "huggingface": "[" * 999})),
        [("x",), ("y",)],
    ),
    "a column twice": (
        lambda: stream(pa.table([["x"], ["y"]], names=["segments", "segments"])),
        "the column 'segments' occurs twice",
    ),
    "another column twice": (
        lambda: stream(pa.table([["x"], [1], [2]], names=["segments", "n", "n"])),
        X,
    ),
    "50 MB of one letter": (
        lambda: feather(pa.table({"segments": ["y" * 50_000_000]}), compression="zstd"),
        "has 50,000,000 characters, more than any model takes",
    ),
    "a text that ends before it begins": (
        lambda: with_offsets(7777, 0, of_list=False),
        UNREADABLE,
    ),
    "a text beyond its buffer": (
        lambda: with_offsets(0, 10**6, of_list=False),
        UNREADABLE,
    ),
    "a text of -10 characters": (lambda: with_offsets(5, -5, of_list=False), UNREADABLE),
    "a list beyond its items": (lambda: with_offsets(0, 10**6, of_list=True), UNREADABLE),
    "a list before its items": (lambda: with_offsets(-3, 2, of_list=True), UNREADABLE),
    "a list that ends before it begins": (
        lambda: with_offsets(7777, 0, of_list=True),
        UNREADABLE,
    ),
    "an index beyond its dictionary": (
        lambda: column(
            pa.DictionaryArray.from_arrays(pa.array([5], pa.int8()), ["x"], safe=False)
        ),
        UNREADABLE,
    ),
    "bytes that are no text": (
        lambda: column(["x" * 4444]).replace(b"x" * 4444, b"\xff" * 4444),
        UNREADABLE,
    ),
    "Avro": (b"Obj\x01" + bytes(99), "not JSON"),
    "a workbook": (b"PK\3\4" + bytes(99), "not JSON"),
    "a database": (b"SQLite format 3\0" + bytes(99), "not JSON"),
}

CASES = {
    f"{ending}: {name}": (f"rows{ending}", *case)
    for ending, cases in ((".jsonl", JSON_LINES), (".csv", CSV), (".bin", BINARY))
    for name, case in cases.items()
}


@pytest.mark.parametrize(("name", "content", "expected"), sampled(CASES))
def test_an_odd_file_gives_right_rows_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: Content, expected: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    made = content() if callable(content) else content
    Path(name).write_bytes(made if isinstance(made, bytes) else made.encode())
    if isinstance(expected, list):
        assert [request.segments for request in read_requests(name)] == expected
    else:
        with pytest.raises(RequestError, match=expected):
            read_requests(name)
        error = run_command("generate", "--dry-run", "--input", name).error
        assert error.startswith(f"error: {name}") or "no row can be used" in error
    assert not Path("PWNED").exists()


@pytest.mark.long
@pytest.mark.parametrize("write", [parquet, feather, stream])
def test_no_flipped_bits_of_a_file_end_in_anything_but_rows_or_one_line(
    tmp_path: Path, write: Callable[[], bytes], record_property: Callable[[str, object], None]
) -> None:
    whole, refused = write(), 0
    record_property("cases", count := 2_000)
    for seed in range(count):
        path = tmp_path / f"{seed}"
        path.write_bytes(flipped(whole, seed))
        try:
            assert len(read_requests(str(path))) <= 2
        except RequestError as error:
            message = str(error)
            assert "\n" not in message
            refused += 1
        path.unlink()
    assert refused > count / 2
