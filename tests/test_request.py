from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flexmask.errors import OptionError, RequestError
from flexmask.inputs import text_rows
from flexmask.request import Request, checked_requests
from flexmask.separator import Separator
from flexmask.tasks.request_source import read_requests


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "questions.jsonl"


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def message_of(source: str, **options: Any) -> str:
    """The message of the refusal, without the name of the file's folder."""
    with pytest.raises(RequestError) as raised:
        read_requests(source, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message.replace(str(Path(source).parent) + "/", "")


def test_a_line_becomes_a_request(path: Path) -> None:
    row = {
        "uuid": "a",
        "prefix": "Answer.\n",
        "segments": ["Where is Lo\u00f1?", "Lo\u00f1 is where?"],
        "suffix": "\nA:",
        "answers": ["Londýn"],
        "comment": "left alone",
    }
    (request,) = read_requests(write_rows(path, row))
    assert request == Request(
        uuid="a",
        prefix="Answer.\n",
        segments=("Where is Loñ?", "Loñ is where?"),
        suffix="\nA:",
        answers=("Londýn",),
    )
    assert request.label == f"{path}:1"


def test_a_segment_alone_keeps_all_but_the_others() -> None:
    request = Request(("x", "y"), "P", "S", ("z",), "a", weights=(1.0, 2.0), source="f:3")
    first, second = request.alone()
    assert second == Request(("y",), "P", "S", ("z",), "a", segment=2)
    assert (first.key, request.key) == (("a", 1, 0), ("a", None, 0))
    assert second.label == "f:3, segment 2"
    assert second.alone() == [second]


def test_all_but_the_segments_may_be_absent_or_null(path: Path) -> None:
    absent = {"segments": ["x"]}
    null = {**absent, "uuid": None, "prefix": None, "suffix": None, "answers": None}
    first, second = read_requests(write_rows(path, absent, null))
    assert first == Request(segments=("x",), uuid="1")
    assert second == Request(segments=("x",), uuid="2")


def test_a_missing_uuid_is_the_line_number_blank_lines_counted(path: Path) -> None:
    path.write_text('\n{"segments": ["x"]}\n  \n{"segments": ["y"]}')
    assert [request.uuid for request in read_requests(str(path))] == ["2", "4"]


def test_a_text_counts_as_a_list_of_one(path: Path) -> None:
    (request,) = read_requests(write_rows(path, {"segments": "x", "answers": "y"}))
    assert (request.segments, request.answers) == (("x",), ("y",))


def test_an_integer_uuid_becomes_text(path: Path) -> None:
    (request,) = read_requests(write_rows(path, {"segments": ["x"], "uuid": 7}))
    assert request.uuid == "7"


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"segments": ["x"]}\n'))
    assert read_requests("-") == [Request(segments=("x",), uuid="1")]
    assert not sys.stdin.closed


def test_a_byte_order_mark_is_skipped(path: Path) -> None:
    path.write_text('{"segments": ["x"]}\n', encoding="utf-8-sig")
    assert len(read_requests(str(path))) == 1


def test_windows_line_ends_are_read(path: Path) -> None:
    path.write_bytes(b'{"segments": ["x"]}\r\n{"segments": ["y"]}\r\n')
    assert len(read_requests(str(path))) == 2


def test_the_first_segments_are_kept(path: Path) -> None:
    source = write_rows(path, {"segments": ["x", "y", "z"]})
    (request,) = read_requests(source, num_segments=2)
    assert request.segments == ("x", "y")
    assert message_of(source, num_segments=4) == ("questions.jsonl:1: 4 segments asked for, got 3")


@pytest.mark.parametrize("count", [0, -1])
def test_the_number_of_segments_to_keep_must_be_positive(count: int) -> None:
    with pytest.raises(RequestError, match=f"must be positive, got {count}"):
        Request(segments=("x", "y")).with_segments(count)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes at column "),
        ("segments: x", "not JSON (Expecting value at column 1); expected one object a line"),
        ('[{"segments": ["x"]}]', "a JSON array; expected JSON Lines, one object a line (jq -c "),
        ('"x"', "expected a JSON object, got a string"),
        ("null", "expected a JSON object, got null"),
        ('{"a":' * 100_000, "JSON that Python cannot read ("),
        ('{"uuid": ' + "9" * 5_000 + "}", "JSON that Python cannot read ("),
        ('{"text": "x", "id": 1}', "the row has no 'segments', a list of strings; its columns: "),
        ("{}", "the row has no 'segments', a list of strings; its columns: none"),
        ('{"segments": []}', "segments must hold at least one text, got none"),
        ('{"segments": 3}', "segments must be a list of strings, got a number"),
        ('{"segments": ["x", 2]}', "segments must be a list of strings, got a number as item 2"),
        ('{"segments": ["x", " "]}', "segment 2 is empty"),
        ('{"segments": ["x"], "prefix": ["y"]}', "prefix must be a string, got an array"),
        ('{"segments": ["x"], "answers": {}}', "answers must be a list of strings, got an object"),
        ('{"segments": ["x"], "uuid": true}', "uuid must be a string or an integer, got a bool"),
        ('{"segments": ["x"], "uuid": 1.5}', "uuid must be a string or an integer, got a number"),
        (
            '{"segments": ["x"], "uuid": ""}',
            "uuid is empty; leave it out to use the row number",
        ),
        (
            '{"segments": ["\\ud83d"]}',
            "segment 1 holds '\\ud83d', half of a surrogate pair; write",
        ),
        (
            '{"segments": ["x"], "answers": ["\\ud83d"]}',
            "answer 1 holds '\\ud83d', half of a surr",
        ),
        (
            '{"segments": ["x"], "suffix": "\\ud83d"}',
            "suffix holds '\\ud83d', half of a surrogate",
        ),
    ],
)
def test_a_line_that_cannot_be_used_is_named(path: Path, line: str, message: str) -> None:
    path.write_text('{"segments": ["good"]}\n' + line + "\n")
    assert message_of(str(path)).startswith(f"questions.jsonl:2: {message}")


def test_two_lines_with_one_uuid_are_refused(path: Path) -> None:
    source = write_rows(path, {"segments": ["x"]}, {"segments": ["y"], "uuid": 1})
    assert message_of(source) == (
        "questions.jsonl:2: uuid '1' is already used by row 1; each row needs its own"
    )


def test_a_missing_file_a_folder_and_an_empty_file_are_refused(path: Path) -> None:
    assert message_of(str(path)) == (
        "questions.jsonl: No such file or directory; `input` takes JSON Lines, CSV, Parquet, "
        "Feather or Arrow, a folder saved by datasets, or a hub id"
    )
    path.write_text("\n \n")
    assert message_of(str(path)) == ("questions.jsonl: no rows in it")
    with pytest.raises(RequestError, match="not a folder that the datasets library saved"):
        read_requests(str(path.parent))


def test_a_file_that_is_not_text_is_refused(path: Path) -> None:
    path.write_bytes(b"\0\xff\xff\xff\xff")
    assert message_of(str(path)).startswith("questions.jsonl: not UTF-8 text (")
    path.write_text('{"segments": ["x"]}\n', encoding="utf-16")
    assert message_of(str(path)).startswith("questions.jsonl: not UTF-8 text (")


def test_a_very_long_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "_MAX_INPUT_CHARACTERS", 50)
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"segments": ["x"]}\n' * 3))
    assert message_of("-") == (
        "standard input: longer than 50 characters; write it to a file and name that"
    )


def test_a_very_long_line_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "_MAX_LINE_CHARACTERS", 30)
    write_rows(path, {"segments": ["x"]}, {"segments": ["x" * 30]})
    assert message_of(str(path)) == (
        "questions.jsonl:2: the line is longer than 30 characters; expected JSON Lines, one "
        "object a line"
    )


def test_a_request_made_by_hand_is_checked_too() -> None:
    with pytest.raises(RequestError, match="segments must hold at least one text"):
        Request(segments=())
    with pytest.raises(RequestError, match="half of a surrogate pair"):
        Request(segments=("x",), prefix="\udcff")
    assert Request(segments=("x",), uuid="q1").label == "request 'q1'"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"segments": "text"},
            "segments must be a tuple of texts, got the text 'text'; write seg",
        ),
        ({"segments": None}, "segments must be a tuple of texts, got None"),
        ({"segments": ("x", 3)}, "segments must be texts, got 3 as number 2"),
        ({"answers": "x"}, "answers must be a tuple of texts, got the text 'x'; write answers="),
        ({"prefix": ["P"]}, r"prefix must be a text, got \['P'\]"),
        ({"uuid": 7}, "uuid must be a text, got 7"),
        ({"weights": 1.0}, "weights must be a tuple of numbers, got 1.0"),
        ({"weights": ("1",)}, "weights must be numbers, got '1' as number 1"),
    ],
)
def test_a_value_of_another_type_is_a_type_error_of_one_sentence(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message) as raised:
        Request(**{"segments": ("x",), **values})
    assert "\n" not in str(raised.value)


def test_lists_of_texts_become_tuples() -> None:
    assert Request(["x", "y"], answers=["z"]) == Request(("x", "y"), answers=("z",))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ("hello", "requests must be a list of Request, got 'hello'; put it into a list"),
        (Request(("x",)), "requests must be a list of Request, got a single one; put it into"),
        (3, "requests must be a list of Request, got 3"),
        (["hello"], r"got 'hello' in it; write Request\(segments=\('hello',\)\)"),
        ([Request(("x",)), None], "got None in it"),
    ],
)
def test_what_is_no_request_is_a_type_error(requests: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        list(checked_requests(requests))


def test_a_separator_divides_a_text_into_segments_and_a_suffix() -> None:
    text = "Read.\n\nOne.\n\n\n\nTwo.\n\nWhich?"
    kept = Separator("\n\n").divide(text)
    assert kept.segments == ("Read.\n\n", "One.\n\n", "Two.\n\n")
    assert kept.prefix + "".join(kept.segments) + kept.suffix == text.replace("\n\n\n\n", "\n\n")
    removed = Separator("\n\n", keep=False, has_prefix=True).divide(text)
    assert (removed.prefix, removed.segments, removed.suffix) == (
        "Read.",
        ("One.", "Two."),
        "Which?",
    )
    named = Separator.of_option(r"\n\n", keep=False, has_prefix=True)
    assert named == Separator("\n\n", keep=False, has_prefix=True)
    assert Separator.of_option(None, keep=True, has_prefix=False) == Separator()
    for separator in (Separator(), Separator("|"), Separator("|", has_prefix=True)):
        assert separator.divide("Which?") == Request(("Which?",))
    with pytest.raises(OptionError, match="must not be empty"):
        Separator("")
