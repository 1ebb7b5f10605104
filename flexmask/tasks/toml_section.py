"""Reads a section of a TOML file; errors name the file, the key and the allowed values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from flexmask.errors import TaskError


class Section:
    """A table of a TOML file whose keys are read one by one, so that unknown ones are found."""

    def __init__(self, file: str, name: str, table: Mapping[str, Any]) -> None:
        """Wrap the table ``name`` of ``file``; the root table has an empty name."""
        self._file = file
        self._name = name
        self._table = table
        self._asked: list[str] = []

    def error(self, key: str, message: str) -> TaskError:
        """Return an error about ``key``."""
        path = f"{self._name}.{key}" if self._name else key
        return TaskError(f"{self._file}: {path} {message}")

    def section(self, key: str) -> Section:
        """Return a table below this one; empty if absent."""
        table = self._get(key, dict, "a table", {})
        return Section(self._file, f"{self._name}.{key}" if self._name else key, table)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string; without a default the key is required."""
        value: str = self._get(key, str, "a string", default)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return ``true`` or ``false``."""
        value: bool = self._get(key, bool, "true or false", default)
        return value

    def count(self, key: str, default: int) -> int:
        """Return an integer of at least 0."""
        value: int = self._get(key, int, "an integer of at least 0", default)
        if isinstance(value, bool) or value < 0:
            raise self.error(key, f"must be an integer of at least 0, got {value!r}")
        return value

    def choice(self, key: str, allowed: Sequence[str], default: str) -> str:
        """Return a string that is one of ``allowed``."""
        value = self.text(key, default)
        if value not in allowed:
            raise self.error(key, f"must be one of {', '.join(allowed)}, got {value!r}")
        return value

    def texts_by_name(self) -> dict[str, tuple[str, ...]]:
        """Return the whole table, in which each value is a string or a list of strings."""
        found = {}
        for key in self._table:
            value = self._get(key, (str, list), "a string or a list of strings", None)
            texts = [value] if isinstance(value, str) else value
            if not texts or not all(isinstance(text, str) for text in texts):
                raise self.error(key, "must be a string or a list of strings")
            found[key] = tuple(texts)
        return found

    def rows(self, key: str) -> tuple[Mapping[str, Any], ...]:
        """Return an array of tables (``[[key]]``); empty if absent."""
        rows = self._get(key, list, f"an array of tables, [[{key}]]", [])
        if not all(isinstance(row, dict) for row in rows):
            raise self.error(key, f"must be an array of tables, [[{key}]]")
        return tuple(rows)

    def has(self, key: str) -> bool:
        """Return True if the key is set."""
        return key in self._table

    def check_all_asked(self) -> None:
        """Check that the table has no key that was not read.

        Raises:
            TaskError: If it has an unknown key.
        """
        for key in self._table:
            if key not in self._asked:
                close = get_close_matches(key, self._asked, n=1)
                meant = f"; did you mean {close[0]!r}?" if close else ""
                raise self.error(key, f"is not known; known here: {', '.join(self._asked)}{meant}")

    def _get(self, key: str, kind: type | tuple[type, ...], kind_name: str, default: Any) -> Any:
        self._asked.append(key)
        value = self._table.get(key, default)
        if value is None:
            raise self.error(key, f"is missing; it must be {kind_name}")
        if not isinstance(value, kind):
            raise self.error(key, f"must be {kind_name}, got {value!r}")
        return value
