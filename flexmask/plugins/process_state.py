"""What belongs to the whole process and code of others may change: folder and streams."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

STREAMS = ("stdin", "stdout", "stderr")


class KeptOpen(io.StringIO):
    """Text that was printed; closing it changes nothing.

    Attributes:
        was_closed: Whether somebody tried to.
    """

    was_closed = False

    def close(self) -> None:
        """Note it."""
        self.was_closed = True


class ProcessState:
    """The working folder and the standard streams as they were when it was made.

    Each is held by a descriptor of its own, which stays valid whatever happens to names, numbers
    and objects.
    """

    def __init__(self) -> None:
        """Hold what is there now."""
        self._folder = _opened_folder()
        self._numbers = {number: _duplicate(number) for number in range(len(STREAMS))}
        self._objects = {name: getattr(sys, name) for name in STREAMS}
        self._originals = {name: getattr(sys, f"__{name}__") for name in STREAMS}

    def restore(self) -> list[str]:
        """Put back what changed; a predicate for each change."""
        return [*self._restore_folder(), *self._restore_numbers(), *self._restore_objects()]

    def close(self) -> None:
        """Let go of all descriptors."""
        for held in (self._folder, *self._numbers.values()):
            if held is not None:
                os.close(held)

    def _restore_folder(self) -> Iterator[str]:
        if self._folder is None:
            return
        with suppress(OSError):  # the folder that is current now may have been removed
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
    """Let what is printed go to ``printed``, under both names that stdout has."""
    before = sys.stdout, sys.__stdout__
    sys.stdout = sys.__stdout__ = printed  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        sys.stdout, sys.__stdout__ = before  # type: ignore[misc]


def _reopen(stream: TextIO, number: int) -> bool:
    """Open a closed stream again in place, since others hold it too."""
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
    except OSError:  # closed by who started the process
        return None


def _opened_folder() -> int | None:
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # removed, or not readable
        return None
