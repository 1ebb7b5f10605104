"""Lists in cells of CSV, as programs print them, and texts that look like lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flexmask.errors import RequestError
from flexmask.inputs.list_cells import check_is_no_list, read_list

TEXTS = [
    "Where was Ada born?",
    "Ada's birthplace?",
    'the "Countess"',
    'it\'s "both"',
    "a\nb",
    "ø\\",
]


@pytest.mark.parametrize("printed", [str, lambda texts: str(np.array(texts, dtype=object)), repr])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_printed_list_is_read_as_it_was(printed: Any, count: int) -> None:
    assert read_list(printed(TEXTS[:count])) == TEXTS[:count]


def test_an_array_is_read_however_numpy_prints_it() -> None:
    array = np.array(TEXTS * 9)
    assert "\n" in str(array)
    for printed in (str(array), repr(array), str(list(array)), repr(array.astype(object))):
        assert read_list(printed) == TEXTS * 9


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ('["a", "\\ud83d\\ude00\\/"]', ["a", "😀/"]),
        ("['a', None]", ["a", None]),
        ('["a", null]', ["a", None]),
        ("['a' nan]", ["a", None]),
        ("[]", []),
        (" [ ] ", []),
        ("['a',]", ["a"]),
        ("[1912, 1913]", [1912, 1913]),
        ("[ 0.5  1.  -2e-1]", [0.5, 1.0, -0.2]),
        ("[True, false]", [True, False]),
    ],
)
def test_nulls_and_numbers_are_read(cell: str, items: list[Any]) -> None:
    assert read_list(cell) == items


@pytest.mark.parametrize(
    "cell",
    [
        "['Q: five?'",
        "['one', 'two",
        "['it's', 'b']",
        "['a' 'b', 'c']",
        "['a''b']",
        "['a' 'b' ... 'y' 'z']",
        '["\\d"]',
    ],
)
def test_a_broken_list_is_refused_and_never_merged(cell: str) -> None:
    with pytest.raises(RequestError, match="a cell begins like a list but is not one"):
        read_list(cell)


@pytest.mark.parametrize(
    "cell",
    [
        "",
        "[MASK]",
        "[MASK] wrote Hamlet.",
        "Who wrote [MASK]?",
        "['Tis the season]",
        '["Heroes" is by whom?',
        '["Heroes"] is by whom?',
        "[Smith, 2020] says what?",
        "[a] or [b], which?",
        "[1] Smith",
        "[[MASK]] is a link",
        "[sic]",
        "[" * 100_000,
        "['" + "x" * 1_000_000,
    ],
)
def test_a_text_that_only_looks_like_a_list_is_left_alone(cell: str) -> None:
    assert read_list(cell) is None
    check_is_no_list(cell)


@pytest.mark.parametrize(
    "cell",
    ["[London, Londres]", "[['a' 'b'] ['c' 'd']]", "[[1 2]\n [3 4]]", '[{"a": "b"}]'],
)
def test_a_cell_that_may_be_a_list_is_refused_where_lists_stand(cell: str) -> None:
    assert read_list(cell) is None
    with pytest.raises(RequestError, match="write a list as JSON"):
        check_is_no_list(cell)
