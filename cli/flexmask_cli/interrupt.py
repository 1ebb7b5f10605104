"""Ctrl-C: the first lets the current batch end, the second ends at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

from flexmask_cli.streams import write_note


class Interrupt:
    """While it is entered, the first Ctrl-C only sets `is_requested`.

    Attributes:
        is_requested: Whether it came.
    """

    def __init__(self) -> None:
        """Nothing was requested yet."""
        self.is_requested = False

    def __enter__(self) -> Self:
        """Take Ctrl-C over."""
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give Ctrl-C back."""
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True
        write_note("")
        write_note("interrupted: the current batch ends first; Ctrl-C again ends at once")
