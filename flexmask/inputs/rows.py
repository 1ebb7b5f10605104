"""What every kind of input gives: rows, read anew by each iteration."""

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
        where: Where it stands, as ``file:line``; for messages.
        number: Its number from 1, in JSON Lines that of its line.
        values: By column; absent values are None or left out. Of CSV and Arrow, a value is
            converted when it is asked for, and one that cannot be raises `RequestError` then.
        error: Why it cannot be read; empty if it can.
    """

    where: str
    number: int
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Input:
    """Rows to be read; every iteration reads them again.

    Attributes:
        name: As messages name it.
        stem: A short name for files made from it.
        split_of: Opens another split, where the input has splits.
        has_fixed_columns: Whether every row has the same columns.
        advice: Added to a message about columns that are missing.
    """

    name: str
    stem: str
    read: Callable[[], Iterator[Row]]
    split_of: Callable[[str], Input] | None = None
    has_fixed_columns: bool = False
    advice: str = ""

    def __iter__(self) -> Iterator[Row]:
        """Read the rows from the beginning."""
        return self.read()


def rows_in_memory(values: Iterable[Mapping[str, Any]], name: str) -> Input:
    """Wrap rows that stand in memory."""
    rows = [Row(f"{name}:{number}", number, row) for number, row in enumerate(values, start=1)]
    return Input(name, Path(name).stem, lambda: iter(rows))


@contextmanager
def as_request_errors(name: str, encoding: str = "UTF-8") -> Iterator[None]:
    """Turn what goes wrong while reading ``name`` into a `RequestError`."""
    try:
        yield
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        raise RequestError(
            f"{name}: not {encoding} text ({reason}); {OPTIONS}; other kinds of input are {KINDS}"
        ) from None
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"{name}: damaged, or of an unknown kind ({reason})") from None
    except OSError as error:
        raise RequestError(f"{name}: {error.strerror or error}; --input takes {KINDS}") from None


def printable(path: Path) -> str:
    r"""The name of a file as text that can be written everywhere.

    Python holds bytes of a name that are not UTF-8 as halves of surrogate pairs, which neither
    a file nor an Arrow column takes; here they are ``\udcff``.
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
    """What JSON calls the type of a value."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)
