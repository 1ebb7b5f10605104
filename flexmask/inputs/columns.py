"""Reads strings and numbers from the columns of a row; null counts as absent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any
from uuid import UUID

from flexmask.errors import RequestError
from flexmask.inputs.list_cells import read_list
from flexmask.inputs.rows import type_name
from flexmask.inputs.text_rows import CsvValues

_EXACT_FLOATS = 2.0**53
"""Below it, every integer has a float of its own, so a whole float is exact."""


class MissingColumnError(RequestError):
    """A row lacks a column that is needed."""


class Columns(Mapping[str, Any]):
    """The columns of a row, some of them renamed; request makers create it.

    As a mapping it holds the values that templates see: nulls are dropped from lists. Values are
    converted on access.
    """

    def __init__(
        self, values: Mapping[str, Any], names: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        """Rename the columns of a row.

        Args:
            values: The values of the row, by column.
            names: For a name, the columns that it is read from; several make a list.

        Raises:
            MissingColumnError: If the row lacks one of those columns.
        """
        self._values = values
        self._names = names or {}
        for name, sources in self._names.items():
            for source in sources:
                if source not in values:
                    known = ", ".join(map(repr, values)) or "none"
                    raise MissingColumnError(
                        f"no column {source!r} for {name}; its columns: {known}"
                    )

    def __getitem__(self, name: str) -> Any:
        """Return the value of a column; from a list, nulls are dropped."""
        value = self._value(name)
        return [item for item in value if item is not None] if _is_list(value) else value

    def __contains__(self, name: object) -> bool:
        """Return True if there is such a column; its value may be null."""
        return name in self._names or name in self._values

    def __iter__(self) -> Iterator[str]:
        """Iterate over the column names."""
        return iter(dict.fromkeys([*self._values, *self._names]))

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(set(self._values) | set(self._names))

    def text(self, name: str) -> str:
        """Return the string in a column; empty if the column is absent or null.

        Raises:
            RequestError: If the value is not a string.
        """
        sources = self._sources(name)
        if isinstance(self._values, CsvValues) and len(sources) == 1:
            return (self._values.text(sources[0]) if name in self else None) or ""
        value = self.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise RequestError(f"{name} must be a string, got {type_name(value)}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Return the list of strings in a column without nulls; a string counts as a list of one.

        Raises:
            RequestError: If the value is neither.
        """
        return self._strings(name, self._items(name))

    def answers(self) -> tuple[str, ...]:
        """Return the column ``answers`` as `texts` does; whole numbers become strings.

        Raises:
            RequestError: If it holds anything but strings and whole numbers.
        """
        items = self._items("answers", takes_numbers=True)
        return self._strings("answers", [_as_answer(item) for item in items])

    def messages(self) -> tuple[Any, ...]:
        """Return the column ``messages``, a list that the caller checks, or its JSON in a string.

        Raises:
            RequestError: If it is neither.
        """
        value = self._value("messages") if "messages" in self else None
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            value = "no JSON"
        if value is None:
            return ()
        if not _is_list(value):
            raise RequestError(f"messages must be a list, got {type_name(value)}")
        return tuple(value)

    def choices(self) -> tuple[str, ...]:
        """Return the column ``choices`` as `answers` does."""
        items = self._items("choices", takes_numbers=True)
        return self._strings("choices", [_as_answer(item) for item in items])

    def answer(self) -> int | str | None:
        """Return the column ``answer``, the right choice: an index, a text, or None.

        Raises:
            RequestError: If it is anything else.
        """
        value = self._value("answer") if "answer" in self else None
        if value is None or isinstance(value, str):
            return value or None
        whole = _as_answer(value)
        if not isinstance(whole, str):
            raise RequestError(
                f"answer must be the index or the text of a choice, got {type_name(value)}"
            )
        return int(whole)

    def weights(self, texts: Iterable[str]) -> tuple[float, ...]:
        """Return the column ``weights``, a number or a list of numbers, without nulls.

        A string that holds a number or a list of numbers is parsed, since CSV has strings only.

        Args:
            texts: Columns of the texts that the weights belong to.

        Raises:
            RequestError: If the value is something else, or its nulls are not at the same indices
                as those of the texts, which leaves open which weight belongs to which text.
        """
        value = self._value("weights") if "weights" in self else None
        if value is None:
            return ()
        try:
            if isinstance(value, str):
                value = _numbers_in(value)
            items = list(value) if _is_list(value) else [value]
            if any(isinstance(item, bool) for item in items):
                raise ValueError
            numbers = [None if item is None else float(item) for item in items]
        except (TypeError, ValueError, OverflowError, RecursionError):
            raise RequestError(f"weights must be a list of numbers, got {value!r:.40}") from None
        if None in numbers:
            owners = [item for column in texts for item in self._items(column)]
            if [item is None for item in owners] != [number is None for number in numbers]:
                raise RequestError(
                    "weights must be null exactly where the texts that they belong to are null"
                )
        return tuple(number for number in numbers if number is not None)

    def uuid(self, default: str) -> str:
        """Return the column ``uuid`` as a string, or ``default`` if it is absent or null.

        Raises:
            RequestError: If it is empty, or neither a string, an integer nor a UUID.
        """
        value = self.get("uuid")
        if value is None:
            return default
        if not isinstance(value, str | int | UUID) or isinstance(value, bool):
            raise RequestError(f"uuid must be a string or an integer, got {type_name(value)}")
        if value == "":
            raise RequestError("uuid is empty; leave it out to use the row number")
        return str(value)

    def _sources(self, name: str) -> tuple[str, ...]:
        return self._names.get(name, (name,))

    def _value(self, name: str) -> Any:
        found = [self._values[source] for source in self._sources(name)]
        return found[0] if len(found) == 1 else found

    def _items(self, name: str, *, takes_numbers: bool = False) -> list[Any]:
        """Return the items of the list in a column, including nulls."""
        if name not in self:
            return []
        if isinstance(self._values, CsvValues):
            found = [
                self._values.list_or_text(source, takes_numbers) for source in self._sources(name)
            ]
        else:
            found = [self._values[source] for source in self._sources(name)]
        if len(found) > 1:
            return found
        (value,) = found
        return list(value) if _is_list(value) else [value]

    def _strings(self, name: str, items: list[Any]) -> tuple[str, ...]:
        for number, item in enumerate(items, start=1):
            if item is not None and not isinstance(item, str):
                where = f" as item {number}" if _is_list(self._value(name)) else ""
                raise RequestError(
                    f"{name} must be a list of strings, got {type_name(item)}{where}"
                )
        return tuple(item for item in items if item is not None)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _as_answer(item: Any) -> Any:
    """Turn a whole number into a string; return anything else unchanged."""
    if isinstance(item, bool):
        return item
    is_whole = (
        isinstance(item, int)
        or (isinstance(item, float) and item.is_integer() and abs(item) < _EXACT_FLOATS)
        or (isinstance(item, Decimal) and item.is_finite() and item == item.to_integral_value())
    )
    return str(int(item)) if is_whole else item


def _numbers_in(text: str) -> Any:
    items = read_list(text)
    return json.loads(text) if items is None else items
