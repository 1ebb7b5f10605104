"""Makes printing safe: streams may be closed, full, or unable to encode a character.

Output that cannot be printed must not end a run and lose its rows. During a run it is dropped, and
the error is reported at the end.
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
    """Wraps a standard stream; after the first failure, nothing more is written to it.

    Attributes:
        is_quiet: True to store a failure and not raise it.
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
        """Raise the stored failure, if there is one.

        Raises:
            BrokenPipeError: If the reader of a pipe has exited; Typer then ends the program
                without a message, as programs in a pipe do.
            OutputError: If it is any other failure, such as a full disk.
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

    A character that cannot be encoded is printed as its escape, such as ``\u6771``. A closed
    stream is replaced by the null device, and so is its descriptor; otherwise the next file to be
    opened would get that descriptor, and with it everything that C code prints.

    Raises:
        OutputError: If standard output cannot be written.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(number)
    before = sys.stdout, sys.stderr
    sys.stdout = _printed(sys.stdout, is_quiet=False)
    sys.stderr = _printed(sys.stderr, is_quiet=True)  # nowhere to report a failure
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
    """Keep output that cannot be printed from ending a run.

    Raises:
        BrokenPipeError: At the end, if the reader of standard output has exited.
        OutputError: At the end, if standard output could not be written.
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
    """Write lines to stdout; control characters are shown as escapes."""
    write_styled(printable(text, LINES) + end)


def write_styled(text: str) -> None:
    """Write text with styles to stdout; text of users must have passed `printable`."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_note(line: str) -> None:
    """Write a line to stderr; failures are ignored, since there is nowhere to report them."""
    print(printable(line, WORDS), file=sys.stderr, flush=True)


def _printed(stream: TextIO | None, *, is_quiet: bool) -> TextIO:
    if stream is None:
        stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return cast(TextIO, _Printed(stream, is_quiet=is_quiet))


def _discard(stream: TextIO) -> None:
    """Discard what a stream has buffered, which Python would try to write again at its exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
