"""Handles Ctrl-C: the first lets what is in flight finish, the second stops the run at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

from flexmask_cli.streams import write_note


class Interrupt:
    """A context manager in which the first Ctrl-C only sets `is_requested`.

    Attributes:
        is_requested: True once Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        """Create it; signals are handled once it is entered."""
        self.is_requested = False

    def __enter__(self) -> Self:
        """Install the signal handler."""
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restore the signal handler that was there before."""
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True
        write_note("")
        write_note("interrupted: prompts in flight finish first; Ctrl-C again ends at once")
