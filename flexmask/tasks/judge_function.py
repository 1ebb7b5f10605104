"""Judges that are Python functions in a file: ``path/to/file.py:name``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

from flexmask.error_text import described, place_of_fault
from flexmask.errors import JudgeError, OptionError
from flexmask.plugins.python_file import digest_of_file, run_file

_REFERENCE = re.compile(r"(?P<path>.+\.py):(?P<name>\w+)")


def is_function(reference: str) -> bool:
    """Return True for ``path/to/file.py:name``."""
    return _REFERENCE.fullmatch(reference) is not None


def judge_function(reference: str) -> Callable[[str, tuple[str, ...]], float]:
    """Return the function of a file, which is run once for each content.

    The function gets the prediction and the accepted answers, and returns a number from 0 to 1,
    or True or False. What is returned here raises `JudgeError` if it fails or returns something
    else.

    Raises:
        OptionError: If the file cannot be run, or has no such function.
    """
    path, name = _parts(reference)
    function = getattr(_module(path.absolute(), path, _digest(path)), name, None)
    if not callable(function):
        raise OptionError(
            f"{path} has no function {name!r}; define {name}(prediction, answers) in it"
        )

    def score(prediction: str, answers: tuple[str, ...]) -> float:
        try:
            value = function(prediction, answers)
        except Exception as error:
            line = place_of_fault(error, str(path.absolute()))
            where = f" at {line}" if line else ""
            raise JudgeError(f"{reference} failed: {described(error)}{where}") from error
        if not isinstance(value, Real) or not 0 <= float(value) <= 1 or math.isnan(value):
            raise JudgeError(f"{reference} must return a number from 0 to 1, got {value!r:.60}")
        return float(value)

    return score


def recorded_function(reference: str) -> str:
    """Return a function as a run's configuration records it, with a digest of its file.

    Raises:
        OptionError: If the file cannot be read.
    """
    return f"{reference} (sha256 {_digest(_parts(reference)[0])})"


@cache
def _module(location: Path, path: Path, digest: str) -> Any:
    return run_file(location, path, f"flexmask_judge_{path.stem}_{digest}", OptionError)


def _digest(path: Path) -> str:
    try:
        return digest_of_file(path)
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}; name a judge's file.py:name") from None


def _parts(reference: str) -> tuple[Path, str]:
    match = _REFERENCE.fullmatch(reference)
    assert match is not None
    return Path(match["path"]), match["name"]
