"""Requests: what to generate for, and reading them from JSON Lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from flexmask.errors import RequestError

_MAX_INPUT_CHARACTERS = 4 * 2**30
"""Every request stands in memory; a larger input is one given by mistake."""
_MAX_LINE_CHARACTERS = 64 * 2**20
"""Well above any model's context; a longer line comes from a file that is not JSON Lines."""

_JSON_TYPES = {
    bool: "a boolean",
    dict: "an object",
    float: "a number",
    int: "a number",
    list: "an array",
    str: "a string",
    type(None): "null",
}


@dataclass(frozen=True)
class Request:
    """One thing to generate for.

    Attributes:
        segments: The branches: paraphrases of one question, documents, prompts. At least one.
        prefix: Text that every segment shares, such as an instruction and few-shot examples.
        suffix: Text after the segments that sees all of them; generation continues it. Empty
            means that it is taken from the segments (`flexmask.layout.TokenizedRequest`).
        answers: Accepted answers, for accuracy; empty where there are none.
        uuid: Identifies the request in a result file.
        source: Where it was read, as ``file:line``; for messages.
    """

    segments: tuple[str, ...]
    prefix: str = ""
    suffix: str = ""
    answers: tuple[str, ...] = ()
    uuid: str = ""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.segments:
            raise RequestError("segments must hold at least one text, got none")
        for number, segment in enumerate(self.segments, start=1):
            if not segment.strip():
                raise RequestError(f"segment {number} is empty")
            _check_text(f"segment {number}", segment)
        for number, answer in enumerate(self.answers, start=1):
            _check_text(f"answer {number}", answer)
        _check_text("prefix", self.prefix)
        _check_text("suffix", self.suffix)
        _check_text("uuid", self.uuid)

    @property
    def label(self) -> str:
        """Names the request in messages: where it was read, else its uuid."""
        return self.source or f"request {self.uuid!r}"

    def with_segments(self, count: int) -> Request:
        """Keep the first ``count`` segments.

        Raises:
            RequestError: If there are fewer, or ``count`` is not positive.
        """
        if count < 1:
            raise RequestError(f"the number of segments must be positive, got {count}")
        if count > len(self.segments):
            raise RequestError(f"{count} segments asked for, got {len(self.segments)}")
        return replace(self, segments=self.segments[:count])


def _check_text(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise RequestError(
            f"{where} holds {character!a}, half of a surrogate pair; write the character whole"
        ) from None


def read_requests(source: str, *, num_segments: int | None = None) -> list[Request]:
    """Read requests from a JSON Lines file, one object a line.

    An object holds ``segments`` (a list of strings) and may hold ``uuid``, ``prefix``,
    ``suffix`` and ``answers``; other keys are left alone, and null is as good as absent. A
    missing ``uuid`` becomes the line number.

    Args:
        source: A path, or ``-`` for standard input.
        num_segments: Keep this many segments of each request.

    Raises:
        RequestError: If the file is missing or too long, or a line cannot be used; the message
            names the file, the line and what to do.
    """
    name = "standard input" if source == "-" else source
    try:
        with nullcontext(sys.stdin) if source == "-" else _open(source) as f:
            requests = list(_parse_lines(_read_lines(f, name), name, num_segments))
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name}: not UTF-8 text ({error.reason}); expected JSON Lines"
        ) from None
    except OSError as error:
        raise RequestError(f"{name}: {error.strerror}; --input takes a JSON Lines file") from None
    if not requests:
        raise RequestError(f"{name}: no requests in it; expected one JSON object a line")
    return requests


def _open(source: str) -> TextIO:
    path = Path(source)
    if path.stat().st_size > _MAX_INPUT_CHARACTERS:
        raise _too_long(source)
    return path.open(encoding="utf-8")


def _read_lines(file: TextIO, name: str) -> Iterator[str]:
    characters = 0
    for number in count(1):
        line = file.readline(_MAX_LINE_CHARACTERS + 1)
        if not line:
            return
        if len(line) > _MAX_LINE_CHARACTERS:
            raise RequestError(
                f"{name}:{number}: the line is longer than {_MAX_LINE_CHARACTERS:,} characters; "
                "expected JSON Lines, one object a line"
            )
        characters += len(line)
        if characters > _MAX_INPUT_CHARACTERS:
            raise _too_long(name)
        yield line.removeprefix("\N{BOM}") if number == 1 else line


def _too_long(name: str) -> RequestError:
    return RequestError(
        f"{name}: longer than {_MAX_INPUT_CHARACTERS:,} characters; split it into several inputs"
    )


def _parse_lines(lines: Iterable[str], name: str, num_segments: int | None) -> Iterator[Request]:
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = _parse_request(line, default_uuid=str(number))
            if num_segments is not None:
                request = request.with_segments(num_segments)
        except RequestError as error:
            raise RequestError(f"{name}:{number}: {error}") from None
        if request.uuid in first_line:
            raise RequestError(
                f"{name}:{number}: uuid {request.uuid!r} already stands on line "
                f"{first_line[request.uuid]}; give each row its own"
            )
        first_line[request.uuid] = number
        yield replace(request, source=f"{name}:{number}")


def _parse_request(line: str, default_uuid: str) -> Request:
    row = _parse_object(line)
    if row.get("segments") is None:
        keys = ", ".join(repr(key) for key in row) or "none"
        raise RequestError(f"the object has no 'segments', a list of strings; its keys: {keys}")
    return Request(
        segments=_texts(row, "segments"),
        prefix=_text(row, "prefix"),
        suffix=_text(row, "suffix"),
        answers=_texts(row, "answers"),
        uuid=_uuid(row, default_uuid),
    )


def _parse_object(line: str) -> dict[str, Any]:
    if line.lstrip().startswith("["):
        raise RequestError(
            "a JSON array; expected JSON Lines, one object a line (jq -c '.[]' converts)"
        )
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"not JSON ({error.msg} at column {error.colno}); expected one object a line"
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deep; an int of too many digits
        raise RequestError(f"JSON that Python does not read ({error})") from None
    if not isinstance(row, dict):
        raise RequestError(f"expected a JSON object, got {_json_type(row)}")
    return row


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RequestError(f"{key} must be a string, got {_json_type(value)}")
    return value


def _texts(row: dict[str, Any], key: str) -> tuple[str, ...]:
    value = row.get(key)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RequestError(f"{key} must be a list of strings, got {_json_type(value)}")
    for number, item in enumerate(value, start=1):
        if not isinstance(item, str):
            raise RequestError(
                f"{key} must be a list of strings, got {_json_type(item)} as item {number}"
            )
    return tuple(value)


def _uuid(row: dict[str, Any], default: str) -> str:
    value = row.get("uuid")
    if value is None:
        return default
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RequestError(f"uuid must be a string or an integer, got {_json_type(value)}")
    if value == "":
        raise RequestError("uuid is empty; leave it out to take the line number")
    return str(value)


def _json_type(value: Any) -> str:
    return _JSON_TYPES[type(value)]
