"""Standard streams that may be closed, full, or of an encoding that lacks a character.

What is printed must not cost a run its rows: while a run goes on, what cannot be printed is
dropped, and said at the end.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from flexmask.errors import OutputError
from flexmask.printable import LINES, WORDS, printable

_STDERR = 2


class _Printed:
    """A standard stream, as far as programs that print use one.

    Once it has failed, nothing more is written to it.

    Attributes:
        is_quiet: Whether a failure is kept, and not raised.
    """

    def __init__(self, stream: TextIO, *, is_quiet: bool) -> None:
        self.is_quiet = is_quiet
        self._stream = stream
        self._failure: OSError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, do: Callable[[], object]) -> None:
        if self._failure is not None:
            return
        try:
            do()
        except OSError as error:
            self._failure = error
            _discard(self._stream)
            if not self.is_quiet:
                self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what went wrong, if anything has.

        Raises:
            BrokenPipeError: If the reader of a pipe has gone; click ends the program without a
                word then, as programs in a pipe do.
            OutputError: If it is anything else, such as a full disk.
        """
        error = self._failure
        if isinstance(error, BrokenPipeError):
            raise error
        if error is not None:
            raise OutputError(
                f"standard output cannot be written ({error.strerror or error}); send it elsewhere"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def prepared_streams() -> Iterator[None]:
    r"""Make the standard streams safe to print to while a command runs.

    A character that an encoding lacks is printed as its escape, such as ``\u6771``. A stream that
    is closed prints nowhere, and its number is taken: the next file that is opened would get it,
    and with it all that is printed by code that does not ask Python.

    Raises:
        OutputError: If standard output cannot be written.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(number)
    before = sys.stdout, sys.stderr
    sys.stdout = _printed(sys.stdout, is_quiet=False)
    sys.stderr = _printed(sys.stderr, is_quiet=True)  # there is nobody to tell
    try:
        yield
    except SystemExit:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            sys.exit(1)
        raise
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def run_goes_on() -> Iterator[None]:
    """Let nothing that cannot be printed end a run.

    Raises:
        BrokenPipeError: At its end, if the reader of standard output has gone.
        OutputError: At its end, if standard output could not be written.
    """
    stream = sys.stdout
    if not isinstance(stream, _Printed):
        yield
        return
    stream.is_quiet = True
    try:
        yield
        stream.flush()
    finally:
        stream.is_quiet = False
    stream.raise_failure()


def write_text(text: str, end: str = "\n") -> None:
    """Write lines to stdout; what would command a terminal shows as an escape."""
    write_styled(printable(text, LINES) + end)


def write_styled(text: str) -> None:
    """Write to stdout what is made here, colours included; others' text is `printable` by then."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_note(line: str) -> None:
    """Write a line to stderr; where that has gone the run goes on without."""
    print(printable(line, WORDS), file=sys.stderr, flush=True)


def _printed(stream: TextIO | None, *, is_quiet: bool) -> TextIO:
    if stream is None:
        stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return cast(TextIO, _Printed(stream, is_quiet=is_quiet))


def _discard(stream: TextIO) -> None:
    """Send nowhere what a stream still holds, which Python would try to write again at the end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
