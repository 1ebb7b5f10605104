"""The outcome of a check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "unavailable", "broken"]
"""``warning``: works, but may be the cause if something else does not. ``unavailable``: does not
work here, and flexmask does without it. ``broken``: does not work, and flexmask needs it.
"""


class WrongResult(Exception):
    """A wrong result: the code under check ran, but differs from its reference."""


@dataclass(frozen=True)
class Check:
    """The outcome of checking one thing that flexmask needs or can use.

    Attributes:
        name: Name of the check.
        state: The outcome.
        detail: The version found, the measured agreement, or the error.
        advice: How to correct it; empty if the state is ok.
    """

    name: str
    state: State
    detail: str
    advice: str = ""


def tried(name: str, attempt: Callable[[], str], advice: str, *, is_needed: bool = True) -> Check:
    """Run an attempt: ok with the text that it returns, else not ok with the error.

    Args:
        name: Name of the check.
        attempt: Runs the code under check, and returns the detail.
        advice: How to correct it if it raises.
        is_needed: Whether flexmask does not work without it.
    """
    try:
        return Check(name, "ok", attempt())
    except Exception as error:  # any error is the outcome of the check
        return Check(name, "broken" if is_needed else "unavailable", described(error), advice)


def described(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
