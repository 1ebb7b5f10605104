"""Tables of many cases, of which the usual test run takes some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

EVERY = 4


def sampled(cases: Mapping[str, tuple[Any, ...]] | Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameters of all cases; three of four are marked ``long``, and run if asked for.

    Args:
        cases: The values of each, by name, or named after the texts among them.
    """
    named = (
        cases.items() if isinstance(cases, Mapping) else ((_name(case), case) for case in cases)
    )
    return [
        pytest.param(*case, id=name, marks=[pytest.mark.long] if number % EVERY else [])
        for number, (name, case) in enumerate(named)
    ]


def _name(case: tuple[Any, ...]) -> str:
    texts = case[0] if isinstance(case[0], tuple) else case
    return " ".join(ascii(text)[1:-1][:20] for text in texts)
