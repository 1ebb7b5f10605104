"""Crash-safe storage of Arrow rows: an append-only journal."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from flexmask.errors import OutputError

WRITING = "cannot be written ({}); finished rows are kept, --resume goes on from them"
"""What `os_errors` says of a write."""


class Journal:
    """The rows that a run has finished: an Arrow IPC stream beside its output.

    It is locked while open (``flock``, advisory); the lock ends with the process, however that
    ends. The file is empty until `restart`, and an empty one does not outlive `close`.

    Attributes:
        path: ``<output>.partial``.
    """

    def __init__(self, output: Path, fd: int) -> None:
        """Take over a locked file; `acquire` is the way to get one."""
        self.path = journal_path(output)
        self._output = output
        self._fd = fd

    @classmethod
    def acquire(cls, output: Path) -> Journal:
        """Lock the journal of an output, which is made where there is none.

        Raises:
            OutputError: If another process holds it, or it cannot be opened.
        """
        path = journal_path(output)
        while True:
            try:
                fd = _open_locked(path)
            except BlockingIOError:
                raise OutputError(
                    f"{output}: another process is writing it; wait for its end, or choose "
                    "another --output"
                ) from None
            except OSError as error:
                raise OutputError(
                    f"{path}: cannot be opened and locked ({error.strerror}); choose another "
                    "place with --output"
                ) from None
            if _stands_at(path, fd):
                return cls(output, fd)
            os.close(fd)  # its owner replaced or removed it before the lock was ours

    def restart(self, schema: pa.Schema, rows: pa.Table) -> None:
        """Replace what it holds, atomically; the lock passes to the new file."""
        temporary = temporary_path(self._output)
        with os_errors(self.path, WRITING):
            fd = _open_locked(temporary, os.O_TRUNC)
            try:
                _write_all(fd, schema.serialize())
                for batch in rows.to_batches():
                    _write_all(fd, batch.serialize())
                os.fsync(fd)
                os.replace(temporary, self.path)
            except BaseException:
                os.close(fd)
                temporary.unlink(missing_ok=True)
                raise
            os.close(self._fd)
            self._fd = fd
            sync_folder(self.path)

    def append(self, batch: pa.RecordBatch) -> None:
        """Write rows and sync them; on failure the journal ends where it ended before."""
        with os_errors(self.path, WRITING):
            end = os.fstat(self._fd).st_size
            try:
                _write_all(self._fd, batch.serialize())
                os.fsync(self._fd)
            except BaseException:
                os.ftruncate(self._fd, end)
                raise

    def close(self, *, keep: bool = True) -> None:
        """Let go of the lock; what was written stays unless ``keep`` is false."""
        fd, self._fd = self._fd, -1
        try:
            if not keep or os.fstat(fd).st_size == 0:
                with os_errors(self.path, "cannot be removed ({})"):
                    self.path.unlink(missing_ok=True)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing alone does not, if a forked child lives
            os.close(fd)


def journal_path(output: Path) -> Path:
    """Where the journal of an output stands."""
    return output.with_name(output.name + ".partial")


@contextmanager
def os_errors(path: Path, message: str) -> Iterator[None]:
    """Turn an `OSError` about ``path`` into an `OutputError`; its reason goes into ``message``."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: {message.format(error.strerror or error)}") from error


def temporary_path(output: Path) -> Path:
    """Where a file is written before it replaces ``output``."""
    return output.with_name(output.name + ".tmp")


def _open_locked(path: Path, flags: int = 0) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | flags, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _stands_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _write_all(fd: int, data: pa.Buffer) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync_folder(path: Path) -> None:
    """Make a rename to ``path`` survive a crash of the machine."""
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems do not sync folders
            os.fsync(fd)
    finally:
        os.close(fd)
