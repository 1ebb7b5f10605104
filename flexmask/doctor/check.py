"""The outcome of one check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "absent", "broken"]
"""``absent``: not here, and flexmask works without. ``broken``: needed, and does not work."""


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


def tried(name: str, attempt: Callable[[], str], advice: str) -> Check:
    """Run an attempt: ok with what it returns, or broken with what it raises.

    Args:
        name: What is checked.
        attempt: Does the thing, and says what it found.
        advice: What to do if it raises.
    """
    try:
        return Check(name, "ok", attempt())
    except Exception as error:  # whatever is wrong here is what the doctor is asked for
        return Check(name, "broken", described(error), advice)


def described(error: BaseException) -> str:
    """An error in one line, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
