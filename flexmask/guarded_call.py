"""Runs code of others so that it cannot hang, print to stdout, or change what the process shares.

What is not contained: `os._exit`, a crash in C, and threads that such code starts and leaves.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Generic, TypeVar

from flexmask.errors import FlexMaskError, OptionError
from flexmask.process_state import KeptOpen, ProcessState, kept_open
from flexmask.torch_settings import read_settings, restore_settings

PLUGIN_TIMEOUT = "FLEXMASK_PLUGIN_TIMEOUT"
"""Environment variable: how many seconds a plugin may take to load."""

DEFAULT_TIMEOUT_S = 10.0
"""Importing torch takes one to five; a plugin needs to import nothing slow."""

SHOWN_CHARACTERS = 60
"""How much is quoted of what a plugin prints."""

T = TypeVar("T")


class _Stopped(BaseException):
    """Raised inside a plugin that took too long."""


@dataclass(frozen=True)
class GuardedResult(Generic[T]):
    """What a call returned or raised, and what it should not have done.

    Attributes:
        value: What it returned; None if it raised.
        error: What it raised, `SystemExit` included; None if it did not.
        notes: What was prevented, a sentence without a subject each.
    """

    value: T | None
    error: BaseException | None
    notes: tuple[str, ...]


def call_guarded(
    function: Callable[[], T], module: str, timeout_s: float | None
) -> GuardedResult[T]:
    """Call ``function`` in a thread, for a limited time.

    Printed text, changed settings of torch, another working directory and closed streams are taken
    back and noted.

    Args:
        function: What to call.
        module: Name of the module whose code it runs; that alone is stopped when it takes too
            long, and not a library that it is importing.
        timeout_s: How long it may take; None for as long as it likes.

    Raises:
        KeyboardInterrupt: If the user, or the function, raises it.
    """
    outcome: list[GuardedResult[T]] = []

    def run() -> None:
        try:
            outcome.append(GuardedResult(function(), None, ()))
        except BaseException as error:
            outcome.append(GuardedResult(None, error, ()))

    settings, state, printed = read_settings(), ProcessState(), KeptOpen()
    # A thread, since nothing else bounds an import on every platform. It has grad mode, default
    # device and context variables of its own.
    thread = threading.Thread(target=run, name=f"loading {module}", daemon=True)
    try:
        with kept_open(printed):
            thread.start()
            try:
                thread.join(timeout_s)
            finally:
                if thread.is_alive():
                    _stop(thread, module)
        notes = state.restore()
    finally:
        state.close()
    notes += [f"changed {change}, which was put back" for change in restore_settings(settings)]
    if printed.was_closed:
        notes.append("closed stdout, which was kept open")
    if text := " ".join(printed.getvalue().split()):
        notes.insert(0, f"printed to stdout, which results may go to: {_shortened(text)!r}")
    if not outcome:
        late = FlexMaskError(
            f"still loading after {timeout_s:g} s; do slow work inside functions, or set "
            f"{PLUGIN_TIMEOUT} to more seconds"
        )
        return GuardedResult(None, late, tuple(notes))
    if isinstance(outcome[0].error, KeyboardInterrupt):
        raise outcome[0].error
    return GuardedResult(outcome[0].value, outcome[0].error, tuple(notes))


def plugin_timeout_s() -> float:
    """Seconds that a plugin may take to load.

    Raises:
        OptionError: If the environment variable holds no positive number.
    """
    text = os.environ.get(PLUGIN_TIMEOUT, str(DEFAULT_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise OptionError(f"{PLUGIN_TIMEOUT} must be a positive number of seconds, got {text!r}")
    return seconds


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _stop(thread: threading.Thread, module: str) -> None:
    """End ``thread`` at its next bytecode, unless it is importing another module.

    Half an import of torch could not be repeated; whoever imports it next waits for the thread.
    """
    import ctypes

    assert thread.ident is not None
    frame = sys._current_frames().get(thread.ident)
    if frame is None or _importing(frame).partition(".")[0] not in ("", module.partition(".")[0]):
        return
    stop = ctypes.pythonapi.PyThreadState_SetAsyncExc
    stop(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stopped))


def _importing(frame: FrameType | None) -> str:
    """Name of the innermost module that a stack is importing; empty if none."""
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            return str(frame.f_globals.get("__name__", ""))
        frame = frame.f_back
    return ""
