"""Parses lists in a single cell of a CSV file, as JSON, Python or numpy write them.

CSV has no lists. ``json.dumps`` and ``str(list)`` write ``["a", "b"]``; pandas, ``datasets`` and
numpy write a column of arrays as ``['a' 'b']``, without commas, which Python would parse as one
string, ``'ab'`` (huggingface/datasets#6778, pandas-dev/pandas#49623).
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from flexmask.errors import RequestError

_ESCAPE = r"\\(?:[\\'\"/abfnrtv]|[0-7]{1,3}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8})"
# Possessive quantifiers: a cell of megabytes that is not a list is rejected in linear time.
_STRING = rf"""'(?:[^'\\]++|{_ESCAPE})*+'|"(?:[^"\\]++|{_ESCAPE})*+\""""
_NUMBER = r"[-+]?(?:\d++\.?\d*+|\.\d++)(?:[eE][-+]?\d++)?"
_ITEM = re.compile(
    rf"(?P<scalar>np\.\w+\()?"  # numpy 2 prints the scalars of a list as np.str_('a')
    rf"(?:(?P<string>{_STRING})|(?P<number>{_NUMBER})|(?P<word>[A-Za-z<][\w>]*+)|(?P<gap>\.\.\.))"
    rf"(?(scalar)\))"
)
_SEPARATOR = re.compile(r"\s*(?P<comma>,)\s*|\s+")
_WORDS = {
    **dict.fromkeys(("None", "null", "nan", "NaN", "NaT", "<NA>")),
    **dict.fromkeys(("True", "true"), True),
    **dict.fromkeys(("False", "false"), False),
}

_START = re.compile(r"\s*+(?:array\()?\[\s*+")
_END = re.compile(r"\](?:,\s*dtype=[^()]*+\))?\s*+")
_QUOTED_START = re.compile(r"\s*\[\s*['\"]")
_QUOTED_END = re.compile(r"['\"]\s*,?\s*\]\s*$")
_NESTED_START = re.compile(r"\s*\[\s*(?:(?:array|list)\(|[\[({]\s*['\"\d-])")
_SHOWN_CHARACTERS = 40


def read_list(cell: str) -> list[Any] | None:
    r"""Parse a flat list; return None if the cell holds plain text.

    Args:
        cell: The cell, unquoted by the CSV parser.

    Returns:
        Strings, numbers, booleans and None.

    Raises:
        RequestError: If the cell is a list of strings with a syntax error, or truncated.

    Example:
        >>> read_list("['Where was Ada born?' \"Ada's birthplace?\"]")
        ['Where was Ada born?', "Ada's birthplace?"]
        >>> read_list("[MASK] wrote Hamlet.") is None
        True
    """
    start = _START.match(cell)
    if start is None:
        return None
    if cell.startswith('["') and (found := _read_json(cell)) is not None:
        return found
    items, position, is_list = _scan(cell, start.end())
    if is_list:
        return items
    is_cut_short = bool(items) and cell[position : position + 1] in ("", "'", '"')
    if _QUOTED_START.match(cell) and (is_cut_short or _QUOTED_END.search(cell[-99:])):
        raise _broken(cell)
    return None


def _read_json(cell: str) -> list[Any] | None:
    """Parse a flat JSON list, several times faster than the scanner, which parses it too."""
    try:
        items = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    is_flat = isinstance(items, list) and not any(isinstance(it, list | dict) for it in items)
    return [None if item != item else item for item in items] if is_flat else None  # NaN


def check_is_no_list(cell: str) -> None:
    """Refuse text that may be a list in an ambiguous notation.

    DuckDB writes ``[London, Londres]`` (duckdb/duckdb#11983), numpy ``[['a' 'b'] ['c' 'd']]``.

    Raises:
        RequestError: If ``cell`` is such a text.
    """
    text = cell.strip()
    if _is_within_brackets(text) and ("," in text or _NESTED_START.match(text)):
        raise _broken(cell)


def _scan(cell: str, position: int) -> tuple[list[Any], int, bool]:
    """Parse items from ``position``.

    Returns:
        The items, the position after them, and True if the list ends there.
    """
    items: list[Any] = []
    commas: set[bool] = set()
    while True:
        end = _END.match(cell, position)
        if end is not None:
            return items, end.end(), end.end() == len(cell) and len(commas) < 2
        item = _ITEM.match(cell, position)
        if item is None or item["gap"] or (item["word"] and item["word"] not in _WORDS):
            return items, position, False
        items.append(_value(item, cell))
        position = item.end()
        separator = _SEPARATOR.match(cell, position)
        if separator is None:
            if not cell.startswith("]", position):
                return items, position, False
            continue
        position = separator.end()
        if not cell.startswith("]", position):
            commas.add(separator["comma"] is not None)


def _value(item: re.Match[str], cell: str) -> Any:
    try:
        if (string := item["string"]) is not None:
            return _unquoted(string)
        if (number := item["number"]) is not None:
            return int(number) if re.fullmatch(r"[-+]?\d+", number) else float(number)
    except (SyntaxError, ValueError):  # an int of too many digits, a line break beside a \
        raise _broken(cell) from None
    return _WORDS[item["word"]]


def _unquoted(string: str) -> str:
    if "\\" not in string:
        return string[1:-1]
    if string[0] == '"':
        try:
            return str(json.loads(string, strict=False))
        except ValueError:  # an escape that Python has and JSON has not
            pass
    return str(ast.literal_eval(string))


def _is_within_brackets(text: str) -> bool:
    """Return True if the bracket that opens ``text`` closes at its end."""
    if not (text.startswith("[") and text.endswith("]")):
        return False
    depth = 0
    for bracket in re.finditer(r"[\[\]]", text):
        depth += 1 if bracket[0] == "[" else -1
        if depth == 0:
            return bracket.end() == len(text)
    return False


def _broken(cell: str) -> RequestError:
    shown = cell if len(cell) <= _SHOWN_CHARACTERS else cell[:_SHOWN_CHARACTERS] + "…"
    return RequestError(
        f"a cell begins like a list but is not one: {shown!r}; write a list as JSON, as in "
        '["a", "b"], and text in brackets as a list of one'
    )
