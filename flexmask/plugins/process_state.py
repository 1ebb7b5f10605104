"""State of the process that plugins may change: the working directory and the streams."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

STREAMS = ("stdin", "stdout", "stderr")


class KeptOpen(io.StringIO):
    """A text stream that stays open when it is closed.

    Attributes:
        was_closed: Whether `close` was called.
    """

    was_closed = False

    def close(self) -> None:
        """Record the call, and stay open."""
        self.was_closed = True


class ProcessState:
    """The working directory and the standard streams at the time of its creation.

    Each is held by a file descriptor of its own, which stays valid if paths are renamed, the
    original descriptors closed or the stream objects replaced.
    """

    def __init__(self) -> None:
        """Duplicate the present descriptors."""
        self._folder = _opened_folder()
        self._numbers = {number: _duplicate(number) for number in range(len(STREAMS))}
        self._objects = {name: getattr(sys, name) for name in STREAMS}
        self._originals = {name: getattr(sys, f"__{name}__") for name in STREAMS}

    def restore(self) -> list[str]:
        """Restore what has changed; return the predicate of a sentence for each change."""
        return [*self._restore_folder(), *self._restore_numbers(), *self._restore_objects()]

    def close(self) -> None:
        """Close all descriptors."""
        for held in (self._folder, *self._numbers.values()):
            if held is not None:
                os.close(held)

    def _restore_folder(self) -> Iterator[str]:
        if self._folder is None:
            return
        with suppress(OSError):  # the present working directory may have been removed
            if os.path.samestat(os.stat("."), os.fstat(self._folder)):
                return
        os.fchdir(self._folder)
        yield "changed the working directory, which was put back"

    def _restore_numbers(self) -> Iterator[str]:
        for number, held in self._numbers.items():
            if held is None:
                continue
            with suppress(OSError):
                if os.path.samestat(os.fstat(number), os.fstat(held)):
                    continue
            os.dup2(held, number)
            name = STREAMS[number]
            yield f"closed or redirected descriptor {number}, {name}, which was put back"

    def _restore_objects(self) -> Iterator[str]:
        for number, name in enumerate(STREAMS):
            setattr(sys, name, self._objects[name])
            setattr(sys, f"__{name}__", self._originals[name])
            stream = self._originals[name]
            if stream is not None and stream.closed and _reopen(stream, number):
                yield f"closed {name}, which was opened again"


@contextmanager
def kept_open(printed: KeptOpen) -> Iterator[None]:
    """Replace ``sys.stdout`` and ``sys.__stdout__`` by ``printed`` for the duration."""
    before = sys.stdout, sys.__stdout__
    sys.stdout = sys.__stdout__ = printed  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        sys.stdout, sys.__stdout__ = before  # type: ignore[misc]


def _reopen(stream: TextIO, number: int) -> bool:
    """Open a closed stream again in place, because other code refers to the same object."""
    if type(stream) is not io.TextIOWrapper:
        return False
    buffer = open(number, "rb" if number == 0 else "wb", closefd=False)  # noqa: SIM115 the stream owns it
    stream.__init__(  # type: ignore[misc]
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
    )
    return True


def _duplicate(number: int) -> int | None:
    try:
        return os.dup(number)
    except OSError:  # closed by the parent process
        return None


def _opened_folder() -> int | None:
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # removed, or not readable
        return None
