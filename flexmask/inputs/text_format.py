"""How a text file is written: its encoding, and what stands between the cells of CSV."""

from __future__ import annotations

import codecs
import csv
import io
from dataclasses import dataclass

from flexmask.errors import OptionError, RequestError

OPTIONS = (
    "--encoding names one that is not UTF-8, such as cp1252 or utf-16, and --delimiter what "
    "stands between the cells of CSV"
)
"""What to do about a text file that does not read well."""

_FOUND_OUT = (",", ";", "\t")
_SHOWN = {",": "commas", ";": "semicolons", "\t": "tabs"}
_UTF_8 = "utf-8-sig"
"""UTF-8, with a byte order mark or without."""


@dataclass(frozen=True)
class TextFormat:
    """How a text file is written, as far as it is told.

    Attributes:
        delimiter: The character between the cells of CSV, which a file is then read as; None for
            files told as CSV by their extension, to be found out.
        encoding: One that Python knows; None for UTF-8.
    """

    delimiter: str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        if self.delimiter is not None and (
            len(self.delimiter) != 1 or self.delimiter in '"\r\n' or ord(self.delimiter) > 0xFFFF
        ):
            raise OptionError(
                "the delimiter must be one character, such as ; or \\t, and no quote or line end, "
                f"got {self.delimiter!r}"
            )
        if self.encoding is not None and not _is_text_encoding(self.encoding):
            raise OptionError(
                "the encoding must be one that Python knows, such as cp1252 or utf-16, got "
                f"{self.encoding!r}"
            )

    @property
    def is_told(self) -> bool:
        """Whether anything is told."""
        return self != TextFormat()

    @property
    def codec(self) -> str:
        """The encoding, as `open` takes it."""
        if self.encoding is None or codecs.lookup(self.encoding).name == "utf-8":
            return _UTF_8
        return self.encoding

    @property
    def encoding_name(self) -> str:
        """The encoding, as messages name it."""
        return self.encoding or "UTF-8"


def find_delimiter(sample: str, *, is_whole: bool, expected: str, name: str) -> str:
    """Find what stands between the cells of CSV: a comma, a semicolon or a tab.

    It divides the first line, and the lines after it into as many cells. Where none divides the
    first line there is one column.

    Args:
        sample: The beginning of the file.
        is_whole: Whether that is all of it; else its last line may be cut off.
        expected: What the file's extension lets expect.
        name: Of the file, for the message.

    Raises:
        RequestError: If it cannot be told.
    """
    rows_by = {delimiter: _rows(sample, delimiter, is_whole) for delimiter in _FOUND_OUT}
    dividing = [item for item, rows in rows_by.items() if rows and len(rows[0]) > 1]
    if len(dividing) > 1:
        even = [item for item in dividing if len(set(map(len, rows_by[item]))) == 1]
        dividing = even or dividing
    if not dividing:
        return expected
    if len(dividing) > 1:
        between = " or ".join(_SHOWN[item] for item in dividing)
        raise RequestError(f"{name}: its cells may be divided by {between}; {OPTIONS}")
    return dividing[0]


def _rows(sample: str, delimiter: str, is_whole: bool) -> list[list[str]]:
    rows = []
    try:
        for row in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, strict=True):
            rows.append(row)  # noqa: PERF402 (those before an error count)
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
