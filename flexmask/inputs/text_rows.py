"""Reads rows of JSON Lines and CSV with Python's own parsers.

Unlike Arrow's parsers, they name the line of a syntax error and continue after it.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from os import dup
from pathlib import Path
from typing import Any, TextIO

from flexmask.errors import RequestError
from flexmask.inputs.bounded_file import open_regular
from flexmask.inputs.list_cells import check_is_no_list, read_list
from flexmask.inputs.rows import Row, as_request_errors, printable, type_name
from flexmask.inputs.text_format import TextFormat, find_delimiter

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""The usual delimiter of CSV files, by extension."""

_MAX_INPUT_CHARACTERS = 4 * 2**30
"""Size limit of standard input, which is kept in memory; more is there by mistake."""
_MAX_LINE_CHARACTERS = 64 * 2**20
"""Well above any model's context; a longer line comes from a file that is not JSON Lines."""
_MAX_DEPTH = 100
"""Nesting limit of JSON; parsers and printers take some hundreds of levels."""
_SAMPLE_CHARACTERS = 64 * 2**10

Lines = Callable[[], Iterator[str]]
"""Reads the lines of an input from the first, with their line ends."""


class KeptLines:
    """The lines of a stream, kept in memory so that they can be read more than once."""

    def __init__(
        self, open_text: Callable[[], AbstractContextManager[TextIO]], name: str, text: TextFormat
    ) -> None:
        """Prepare to read; nothing is read yet."""
        self._kept: list[str] = []
        self._name = name
        self._unread = self._read(open_text, text)

    def __call__(self) -> Iterator[str]:
        """Yield the lines, from the first."""
        yield from self._kept
        for line in self._unread:
            self._kept.append(line)
            yield line

    def _read(
        self, open_text: Callable[[], AbstractContextManager[TextIO]], text: TextFormat
    ) -> Iterator[str]:
        characters = 0
        with as_request_errors(self._name, text.encoding_name), open_text() as file:
            for line in _lines(file, self._name):
                characters += len(line)
                if characters > _MAX_INPUT_CHARACTERS:
                    raise RequestError(
                        f"{self._name}: longer than {_MAX_INPUT_CHARACTERS:,} characters; "
                        "write it to a file and name that"
                    )
                yield line


def lines_of_stdin(text: TextFormat) -> Lines:
    """Return the lines of standard input, decoded as ``text`` says.

    The encoding of the terminal has no effect, because bytes are read.
    """

    def open_text() -> AbstractContextManager[TextIO]:
        if sys.stdin is None:
            raise RequestError("standard input: it is closed; pipe rows into it, or name a file")
        try:
            fd = sys.stdin.fileno()
        except OSError:  # replaced by an object that is not a file
            return nullcontext(sys.stdin)
        return open(fd, encoding=text.codec, newline="", closefd=False)

    return KeptLines(open_text, "standard input", text)


def lines_of_pipe(fd: int, name: str, text: TextFormat) -> Lines:
    """Return the lines of an open pipe."""
    return KeptLines(lambda: open(dup(fd), encoding=text.codec, newline=""), name, text)


def lines_of_file(path: Path, text: TextFormat) -> Lines:
    """Return the lines of a file."""

    def lines() -> Iterator[str]:
        name = printable(path)
        with as_request_errors(name, text.encoding_name):
            open_regular(path).close()
            with path.open(encoding=text.codec, newline="") as file:
                yield from _lines(file, name)

    return lines


def json_rows(lines: Lines, name: str, first: int = 0) -> Iterator[Row]:
    """Yield the rows of JSON Lines, without the first ``first``.

    Blank lines are no rows, but counted.
    """
    index = -1
    for number, line in enumerate(lines(), start=1):
        if not line.strip():
            continue
        index += 1
        if index < first:
            continue
        where = f"{name}:{number}"
        try:
            yield Row(where, number, _json_object(line))
        except RequestError as error:
            yield Row(where, number, error=str(error))


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
        raise RequestError(f"JSON that Python cannot read ({error})") from None
    if not isinstance(row, dict):
        raise RequestError(f"expected a JSON object, got {type_name(row)}")
    if line.count("[") + line.count("{") > _MAX_DEPTH and is_deeper(row, _MAX_DEPTH):
        raise RequestError(f"JSON nested more than {_MAX_DEPTH} levels deep; write it flatter")
    return row


def is_deeper(value: Any, depth: int) -> bool:
    """Return True if lists and mappings are nested more than ``depth`` levels deep."""
    level = [value]
    for _ in range(depth + 1):
        nested: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                nested += item.values()
            elif isinstance(item, list):
                nested += item
        level = [item for item in nested if isinstance(item, list | Mapping)]
        if not level:
            return False
    return True


class CsvValues(Mapping[str, Any]):
    """The cells of a CSV row by column: text, a list if written as one, or None if empty.

    A cell is parsed on access, so unused columns may hold anything.
    """

    def __init__(self, index_of: Mapping[str, int], cells: list[str]) -> None:
        """Wrap the cells of a row.

        Args:
            index_of: The index of each column.
            cells: The texts of the cells.
        """
        self._index_of = index_of
        self._cells = cells

    def text(self, column: str) -> str | None:
        """Return the text of a cell; None if empty."""
        return self._cells[self._index_of[column]] or None

    def list_or_text(self, column: str, takes_numbers: bool = False) -> Any:
        """Return a cell of a column that holds a list of strings or a single string.

        Args:
            column: Name of the column.
            takes_numbers: Whether a list of numbers is parsed; otherwise it is text.

        Raises:
            RequestError: If the cell is a malformed list, or an ambiguous one.
        """
        value = self[column]
        if isinstance(value, str):
            items = read_list(value)
            if items is None:
                check_is_no_list(value)
            elif takes_numbers:
                return items
        return value

    def __getitem__(self, column: str) -> Any:
        """Return a cell; a list of numbers only stays text.

        Raises:
            RequestError: If the cell is a malformed list.
        """
        cell = self.text(column)
        if cell is None or (items := read_list(cell)) is None:
            return cell
        has_texts = any(item is None or isinstance(item, str) for item in items)
        return items if has_texts or not items else cell

    def __contains__(self, column: object) -> bool:
        """Return True if the file has the column; no cell is parsed."""
        return column in self._index_of

    def __iter__(self) -> Iterator[str]:
        """Iterate over the column names."""
        return iter(self._index_of)

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self._index_of)


def csv_rows(
    lines: Lines, name: str, expected: str, delimiter: str | None, first: int = 0
) -> Iterator[Row]:
    """Yield the rows of CSV; the first line names the columns.

    Args:
        lines: Lines of the file.
        name: Name of the file.
        expected: The usual delimiter of its extension.
        delimiter: The delimiter that the user set; None to detect it.
        first: Number of rows to leave out at the beginning.
    """
    csv.field_size_limit(_MAX_LINE_CHARACTERS)
    if delimiter is None:
        delimiter = find_delimiter(**_sample(lines), expected=expected, name=name)
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    index_of = _columns(reader, name)
    number = 1
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:  # a blank line
                continue
            row = Row(where, number, _csv_values(index_of, cells))
        except (csv.Error, RequestError) as error:
            row = Row(where, number, error=f"not CSV ({error})")
        if number > first:
            yield row
        number += 1


def _columns(reader: Iterable[list[str]], name: str) -> dict[str, int]:
    try:
        columns = next(iter(reader), [])
    except csv.Error as error:
        raise RequestError(f"{name}:1: not CSV ({error})") from None
    if len(set(columns)) < len(columns):
        raise RequestError(f"{name}:1: a column occurs twice: {', '.join(columns)}")
    return {column: index for index, column in enumerate(columns)}


def _csv_values(index_of: Mapping[str, int], cells: list[str]) -> CsvValues:
    if len(cells) != len(index_of):
        raise RequestError(f"{len(cells)} cells under {len(index_of)} columns")
    return CsvValues(index_of, cells)


def _sample(lines: Lines) -> dict[str, Any]:
    """Return the beginning of a file, and whether it is the whole file."""
    kept: list[str] = []
    characters = 0
    for line in lines():
        if characters + len(line) > _SAMPLE_CHARACTERS and kept:
            return {"sample": "".join(kept), "is_whole": False}
        kept.append(line)
        characters += len(line)
    return {"sample": "".join(kept), "is_whole": True}
