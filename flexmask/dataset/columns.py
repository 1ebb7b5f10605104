"""Takes texts and numbers out of the columns of a row; null is as good as absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flexmask.errors import RequestError

_TYPE_NAMES = {
    bool: "a boolean",
    dict: "an object",
    float: "a number",
    int: "a number",
    list: "an array",
    str: "a string",
    type(None): "null",
}


def renamed(values: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Add, under each name in ``columns``, the value of the column given for it.

    Several columns make a list of their values, nulls left out.

    Raises:
        RequestError: If a column is not there.
    """
    row = dict(values)
    for name, sources in columns.items():
        for source in sources:
            if source not in values:
                known = ", ".join(map(repr, values)) or "none"
                raise RequestError(f"no column {source!r} for {name}; its columns: {known}")
        found = [values[source] for source in sources]
        row[name] = found[0] if len(found) == 1 else [item for item in found if item is not None]
    return row


def text_of(values: Mapping[str, Any], column: str) -> str:
    """The string in a column, empty where there is none.

    Raises:
        RequestError: If it is something else.
    """
    value = values.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RequestError(f"{column} must be a string, got {type_name(value)}")
    return value


def texts_of(values: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """The strings of a list in a column; a string counts as a list of one.

    Raises:
        RequestError: If it is something else.
    """
    value = values.get(column)
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        raise RequestError(f"{column} must be a list of strings, got {type_name(value)}")
    for number, item in enumerate(value, start=1):
        if not isinstance(item, str):
            raise RequestError(
                f"{column} must be a list of strings, got {type_name(item)} as item {number}"
            )
    return tuple(value)


def numbers_of(values: Mapping[str, Any], column: str) -> tuple[float, ...]:
    """The numbers of a list in a column; a number counts as a list of one.

    They may be written as text, alone or as a JSON list, which is all that CSV has.

    Raises:
        RequestError: If it is something else.
    """
    value = values.get(column)
    if value is None:
        return ()
    try:
        if isinstance(value, str):
            value = json.loads(value)
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in items):
            raise ValueError
        return tuple(map(float, items))
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise RequestError(f"{column} must be a list of numbers, got {value!r:.40}") from None


def uuid_of(values: Mapping[str, Any], default: str) -> str:
    """The column ``uuid`` as text, else ``default``.

    Raises:
        RequestError: If it is empty, or neither a string nor an integer.
    """
    value = values.get("uuid")
    if value is None:
        return default
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RequestError(f"uuid must be a string or an integer, got {type_name(value)}")
    if value == "":
        raise RequestError("uuid is empty; leave it out to take the number of the row")
    return str(value)


def type_name(value: Any) -> str:
    """What JSON calls the type of a value."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)
