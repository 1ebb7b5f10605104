"""Runs a plugin's code so that it cannot end the process, print to stdout or change the streams.

It cannot prevent `os._exit`, a crash in C code, and threads that the code leaves running; code
that never returns can be interrupted by Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from flexmask.plugins.process_state import KeptOpen, ProcessState, kept_open

SHOWN_CHARACTERS = 60
"""Number of characters that are quoted of a plugin's output."""

T = TypeVar("T")


@dataclass(frozen=True)
class GuardedResult(Generic[T]):
    """The outcome of a guarded call.

    Attributes:
        value: The returned value; None if the call raised.
        error: The exception that it raised, including `SystemExit`; None if it returned.
        notes: Its side effects on the process, which were undone; predicates of sentences.
    """

    value: T | None
    error: BaseException | None
    notes: tuple[str, ...]


def call_guarded(function: Callable[[], T]) -> GuardedResult[T]:
    """Call ``function``, and undo its changes of the standard streams and the working directory.

    Raises:
        KeyboardInterrupt: If the user, or the function, raises it.
    """
    state, printed = ProcessState(), KeptOpen()
    value, error = None, None
    try:
        with kept_open(printed):
            try:
                value = function()
            except KeyboardInterrupt:
                raise
            except BaseException as raised:
                error = raised
        notes = state.restore()
    finally:
        state.close()
    if printed.was_closed:
        notes.append("closed stdout, which was kept open")
    if text := " ".join(printed.getvalue().split()):
        notes.insert(0, f"printed to stdout, which results may go to: {_shortened(text)!r}")
    return GuardedResult(value, error, tuple(notes))


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
