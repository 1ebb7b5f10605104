"""Names the differences between two records of JSON values, for messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_LONGEST_SHOWN = 80


def differences(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> list[str]:
    """Return the values that differ, such as ``seed: 1 → 2``; nested keys are joined by dots."""
    old, new = dict(_leaves(earlier)), dict(_leaves(later))
    return [
        f"{key}: {_shown(old.get(key))} → {_shown(new.get(key))}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def _leaves(values: Mapping[str, Any], parents: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{parents}{key}.")
        else:
            yield f"{parents}{key}", repr(json.loads(json.dumps(value)))


def _shown(value: str | None) -> str:
    if value is None:
        return "not set"
    return value if len(value) <= _LONGEST_SHOWN else value[: _LONGEST_SHOWN - 1] + "…"
