"""The rows of an input, and errors raised while they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexmask.errors import RequestError
from flexmask.inputs.text_format import OPTIONS

KINDS = "JSON Lines, CSV, Parquet, Feather or Arrow, a folder saved by datasets, or a hub id"


@dataclass(frozen=True)
class Row:
    """One row of an input.

    Attributes:
        where: ``file:line`` or ``file:row``, for messages.
        number: Row number from 1; in JSON Lines the line number.
        values: By column; absent values are None or missing. Values of CSV and Arrow inputs are
            converted on access, which raises `RequestError` if a value cannot be converted.
        error: Why the row cannot be read; empty if it can.
    """

    where: str
    number: int
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Input:
    """An input that is read again from the beginning by every iteration.

    Attributes:
        name: Its name in messages.
        stem: A short name, used in the names of output files.
        read: Reads the rows without the first N, for a given N; those are not converted.
        split_of: Opens another split of the same input; None if it has no splits.
        has_fixed_columns: Whether every row has the same columns.
        advice: Appended to messages about missing columns.
    """

    name: str
    stem: str
    read: Callable[[int], Iterator[Row]]
    split_of: Callable[[str], Input] | None = None
    has_fixed_columns: bool = False
    advice: str = ""

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows from the beginning."""
        return self.read(0)

    def rows_from(self, first: int) -> Iterator[Row]:
        """Iterate over the rows without the first ``first``."""
        return self.read(first)


def rows_in_memory(values: Iterable[Mapping[str, Any]], name: str) -> Input:
    """Make an input of rows in memory."""
    rows = [Row(f"{name}:{number}", number, row) for number, row in enumerate(values, start=1)]
    return Input(name, Path(name).stem, lambda first: iter(rows[first:]))


@contextmanager
def as_request_errors(name: str, encoding: str | None = "UTF-8") -> Iterator[None]:
    """Turn errors raised while an input is read into a `RequestError`.

    Args:
        name: Name of the input.
        encoding: Encoding of its text; None for binary formats.
    """
    try:
        yield
    except UnicodeError as error:
        if encoding is None:  # raised for the name of a column
            raise _damaged(name, error) from None
        reason = getattr(error, "reason", error)
        raise RequestError(
            f"{name}: not {encoding} text ({reason}); {OPTIONS}; other kinds of input are {KINDS}"
        ) from None
    except pa.ArrowException as error:
        raise _damaged(name, error) from None
    except OSError as error:
        if error.errno is None:  # Arrow raises it for damaged files
            raise _damaged(name, error) from None
        raise RequestError(f"{name}: {error.strerror or error}; `input` takes {KINDS}") from None


def _damaged(name: str, error: Exception) -> RequestError:
    reason = " ".join(str(error).split())
    return RequestError(f"{name}: damaged, or of an unknown kind ({reason})")


def printable(path: Path) -> str:
    r"""Return the name of a file as text that can be encoded as UTF-8.

    Python decodes bytes of a file name that are not UTF-8 to lone surrogates, which can be
    written neither to a file nor to an Arrow column; here they become escapes, ``\udcff``.
    """
    return str(path).encode(errors="backslashreplace").decode()


_TYPE_NAMES = {
    bool: "a boolean",
    dict: "an object",
    float: "a number",
    int: "a number",
    list: "an array",
    str: "a string",
    type(None): "null",
}


def type_name(value: Any) -> str:
    """Return JSON's name for the type of a value."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)
