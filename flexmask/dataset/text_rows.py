"""Rows of JSON Lines and CSV, through Python's own parsers.

Unlike Arrow's, those name the line that is broken, and go on after it.
"""

from __future__ import annotations

import ast
import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from flexmask.dataset.columns import type_name
from flexmask.dataset.rows import Row, as_request_errors
from flexmask.errors import RequestError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""By extension, what stands between cells."""

_MAX_INPUT_CHARACTERS = 4 * 2**30
"""Standard input stands in memory; a larger one is given by mistake."""
_MAX_LINE_CHARACTERS = 64 * 2**20
"""Well above any model's context; a longer line comes from a file that is not JSON Lines."""

_LIST_START = re.compile(r"""\s*\[\s*(["']|\])""")


class StandardInput:
    """Lines of standard input, kept so that they can be read more than once."""

    def __init__(self) -> None:
        """Read nothing yet."""
        self._kept: list[str] = []
        self._unread = self._lines()

    def rows(self) -> Iterator[Row]:
        """Rows of the JSON Lines there, from the first."""
        return _parsed(self._replay(), "standard input")

    def _replay(self) -> Iterator[str]:
        yield from self._kept
        for line in self._unread:
            self._kept.append(line)
            yield line

    def _lines(self) -> Iterator[str]:
        characters = 0
        with as_request_errors("standard input"):
            for line in _lines(sys.stdin, "standard input"):
                characters += len(line)
                if characters > _MAX_INPUT_CHARACTERS:
                    raise RequestError(
                        f"standard input: longer than {_MAX_INPUT_CHARACTERS:,} characters; "
                        "write it to a file and name that"
                    )
                yield line


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON Lines file; blank lines are counted and left out."""
    with as_request_errors(str(path)), path.open(encoding="utf-8") as file:
        yield from _parsed(_lines(file, str(path)), str(path))


def _lines(file: TextIO, name: str) -> Iterator[str]:
    for number in count(1):
        line = file.readline(_MAX_LINE_CHARACTERS + 1)
        if not line:
            return
        if len(line) > _MAX_LINE_CHARACTERS:
            raise RequestError(
                f"{name}:{number}: the line is longer than {_MAX_LINE_CHARACTERS:,} characters; "
                "expected JSON Lines, one object a line"
            )
        yield line.removeprefix("\N{BOM}") if number == 1 else line


def _parsed(lines: Iterable[str], name: str) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            yield Row(where, number, _json_object(line))
        except RequestError as error:
            yield Row(where, number, error=str(error))


def _json_object(line: str) -> dict[str, Any]:
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
        raise RequestError(f"expected a JSON object, got {type_name(row)}")
    return row


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a CSV file whose first line names the columns; every cell is text or a list."""
    csv.field_size_limit(_MAX_LINE_CHARACTERS)
    with (
        as_request_errors(str(path)),
        path.open(encoding="utf-8-sig", newline="") as file,
    ):
        reader = csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()], strict=True)
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise RequestError(f"{path}:1: a column stands twice: {', '.join(columns)}")
        number = 1
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if not cells:  # a blank line
                    continue
                row = Row(where, number, _csv_values(columns, cells))
            except (csv.Error, RequestError) as error:
                row = Row(where, number, error=f"not CSV ({error})")
            yield row
            number += 1


def _csv_values(columns: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(columns):
        raise RequestError(f"{len(cells)} cells under {len(columns)} columns")
    return {name: _csv_value(cell) for name, cell in zip(columns, cells, strict=True)}


def _csv_value(cell: str) -> Any:
    """The text of a cell, None if empty; a list if written as JSON or as Python prints it."""
    if not _LIST_START.match(cell):
        return cell or None
    try:
        return json.loads(cell)
    except ValueError:
        try:
            return ast.literal_eval(cell)
        except (SyntaxError, ValueError):
            raise RequestError(f"a cell begins like a list and is none: {cell[:40]!r}") from None
