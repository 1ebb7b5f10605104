"""The outcome of one check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "unavailable", "broken"]
"""``warning``: works, but may be the cause if something else does not. ``unavailable``: does not
work here, and flexmask does without it. ``broken``: does not work, and flexmask needs it.
"""


class WrongResult(Exception):
    """What was tried ran, and computed something else than its plain twin."""


@dataclass(frozen=True)
class Check:
    """What was found of one thing that flexmask needs or can use.

    Attributes:
        name: What was checked.
        state: What came of it.
        detail: What was found.
        advice: What to do; empty if it is ok.
    """

    name: str
    state: State
    detail: str
    advice: str = ""


def tried(name: str, attempt: Callable[[], str], advice: str, *, is_needed: bool = True) -> Check:
    """Run an attempt: ok with what it returns, or not with what it raises.

    Args:
        name: What is checked.
        attempt: Does the thing, and says what it found.
        advice: What to do if it raises.
        is_needed: Whether flexmask does not work without.
    """
    try:
        return Check(name, "ok", attempt())
    except Exception as error:  # whatever is wrong here is what the doctor is asked for
        return Check(name, "broken" if is_needed else "unavailable", described(error), advice)


def described(error: BaseException) -> str:
    """An error in one line, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
