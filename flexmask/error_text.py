"""Describes errors: type and message in one line, and the line of code at fault."""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import CodeType
from typing import Any

from flexmask.errors import FlexMaskError, shortened


def described(error: BaseException) -> str:
    """Return an error's message in one line, after its type unless it is a `FlexMaskError`."""
    message = shortened(" ".join(_text_of(error).split()))
    if isinstance(error, FlexMaskError):
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as failure:  # of somebody's own __str__
        return f"its message cannot be had, since that raises {type(failure).__name__}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: ``; did you mean 'causal'?``, or an empty text."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_panic(error: BaseException) -> bool:
    """Return True for a panic of a library written in Rust, which is no `Exception`."""
    return type(error).__name__ == "PanicException"


def place_of_fault(error: BaseException, module: str) -> str | None:
    """Return the innermost line of a module, or of its package, in an error's traceback.

    Args:
        error: The exception.
        module: Dotted name of the module, or path of its file.

    Returns:
        For example ``flexmask_mine.py:3: `import nowhere```; None if there is no such line.
    """
    if isinstance(error, SyntaxError) and error.filename and _belongs(error.filename, module):
        return _place(error.filename, error.lineno or 1, error.text or "")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _belongs(frame.filename, module)]
    return _place(own[-1].filename, own[-1].lineno or 1, own[-1].line or "") if own else None


def innermost_place(error: BaseException) -> str:
    """Return the line that raised ``error``."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return _place(frame.filename, frame.lineno or 1, frame.line or "")


def place_of_code(function: Callable[..., Any]) -> str | None:
    """Return the line of a function's definition, in the same form; None without source."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if not isinstance(code, CodeType):
        return None
    line = code.co_firstlineno
    while linecache.getline(code.co_filename, line).lstrip().startswith("@"):
        line += 1
    return _place(code.co_filename, line, linecache.getline(code.co_filename, line))


def _belongs(filename: str, module: str) -> bool:
    path = Path(filename)
    if module.endswith(".py"):
        return path.resolve() == Path(module).resolve()
    top = module.partition(":")[0].partition(".")[0]
    _, found, inner = path.as_posix().rpartition(f"/{top}")
    # A project folder may have its package's name and contain an environment with all others.
    return (
        bool(found) and (inner == ".py" or inner.startswith("/")) and "site-packages" not in inner
    )


def _place(filename: str, line: int, text: str) -> str:
    return f"{Path(filename).name}:{line}: `{text.strip()}`"
