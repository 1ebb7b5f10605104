"""The format of a text file: its encoding and, for CSV, the delimiter."""

from __future__ import annotations

import codecs
import csv
import io
from dataclasses import dataclass

from flexmask.errors import OptionError, RequestError

OPTIONS = (
    "`encoding` sets an encoding other than UTF-8, such as cp1252 or utf-16, and `delimiter` the "
    "character between the cells of CSV"
)
"""Advice about a text file that cannot be read."""

_DETECTED = (",", ";", "\t")
_SHOWN = {",": "commas", ";": "semicolons", "\t": "tabs"}
_UTF_8 = "utf-8-sig"
"""UTF-8, with or without a byte order mark."""


@dataclass(frozen=True)
class TextFormat:
    """Delimiter and encoding of a text file, where the user sets them.

    Attributes:
        delimiter: The character between the cells of CSV; a file of any extension is then read as
            CSV. None detects it, for files whose extension is one of CSV.
        encoding: An encoding that Python knows; None for UTF-8.
    """

    delimiter: str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        if self.delimiter is not None and (
            len(self.delimiter) != 1 or self.delimiter in '"\r\n' or ord(self.delimiter) > 0xFFFF
        ):
            raise OptionError(
                "the delimiter must be one character, such as ; or \\t, and not a quote or line "
                f"end, got {self.delimiter!r}"
            )
        if self.encoding is not None and not _is_text_encoding(self.encoding):
            raise OptionError(
                "the encoding must be one that Python knows, such as cp1252 or utf-16, got "
                f"{self.encoding!r}"
            )

    @property
    def is_given(self) -> bool:
        """True if the delimiter or the encoding is set."""
        return self != TextFormat()

    @property
    def codec(self) -> str:
        """The encoding as `open` takes it."""
        if self.encoding is None or codecs.lookup(self.encoding).name == "utf-8":
            return _UTF_8
        return self.encoding

    @property
    def encoding_name(self) -> str:
        """The encoding as messages name it."""
        return self.encoding or "UTF-8"


def find_delimiter(sample: str, *, is_whole: bool, expected: str, name: str) -> str:
    """Detect the delimiter of a CSV file: a comma, a semicolon or a tab.

    It is the one that splits the first line, and the lines after it into equally many cells. If
    none splits the first line, there is a single column.

    Args:
        sample: The beginning of the file.
        is_whole: Whether the sample is the whole file; otherwise its last line may be truncated.
        expected: The usual delimiter of the file's extension, returned for a single column.
        name: Name of the file, for the message.

    Raises:
        RequestError: If several delimiters are possible.
    """
    rows_by = {delimiter: _rows(sample, delimiter, is_whole) for delimiter in _DETECTED}
    dividing = [item for item, rows in rows_by.items() if rows and len(rows[0]) > 1]
    if len(dividing) > 1:
        even = [item for item in dividing if len(set(map(len, rows_by[item]))) == 1]
        dividing = even or dividing
    if not dividing:
        return expected
    if len(dividing) > 1:
        between = " or ".join(_SHOWN[item] for item in dividing)
        raise RequestError(f"{name}: its cells may be separated by {between}; {OPTIONS}")
    return dividing[0]


def _rows(sample: str, delimiter: str, is_whole: bool) -> list[list[str]]:
    rows = []
    try:
        for row in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, strict=True):
            rows.append(row)  # noqa: PERF402 (keeps the rows before an error)
    except csv.Error:
        is_whole = True
    if not is_whole:
        rows = rows[:-1] or rows
    return [row for row in rows if row]


def _is_text_encoding(name: str) -> bool:
    try:
        "".encode(name)
    except (LookupError, UnicodeError, ValueError):  # ValueError: a name with a null character
        return False
    return True
