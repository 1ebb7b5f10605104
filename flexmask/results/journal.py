"""The journal: crash-safe, append-only storage of finished rows."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from flexmask.errors import OutputError
from flexmask.file_syncing import sync_folder
from flexmask.results.journal_stream import JournalContent, read_stream, sealed
from flexmask.results.whole_file import (
    NOT_FOLLOWED,
    WRITING,
    create_temporary,
    os_errors,
    temporary_path,
)

_COPIED_BYTES = 1 << 20


class OutputInUseError(OutputError):
    """Another process is writing the output."""


class Journal:
    """The finished rows of a run: an Arrow IPC stream beside the output.

    The file is locked while open (``flock``, advisory); the lock ends with the process, even if
    it is killed. It is empty until `restart`, and `close` removes it if it is still empty. Rows
    are read through the open descriptor, so renaming or removing the file does not affect them.

    Attributes:
        path: ``<output>.partial``.
    """

    def __init__(self, output: Path, fd: int) -> None:
        """Wrap a locked file; use `acquire` to get one."""
        self.path = journal_path(output)
        self._output = output
        self._fd = fd
        self._end = os.fstat(fd).st_size
        self._chain = 0

    @classmethod
    def acquire(cls, output: Path) -> Journal:
        """Open and lock the journal of an output; create it if it does not exist.

        Raises:
            OutputInUseError: If another process holds the lock.
            OutputError: If the file cannot be opened.
        """
        path = journal_path(output)
        while True:
            try:
                fd = _open_locked(path)
            except BlockingIOError:
                raise OutputInUseError(
                    f"{output}: another process is writing it; wait until it ends, or choose "
                    "another `output`"
                ) from None
            except OSError as error:
                is_link = error.errno == errno.ELOOP
                reason = "it is a symbolic link" if is_link else error.strerror
                raise OutputError(
                    f"{path}: cannot be opened and locked ({reason}); choose another `output`"
                ) from None
            if _is_file_at(path, fd):
                return cls(output, fd)
            os.close(fd)  # its owner replaced or removed it before we got the lock

    def read(self) -> JournalContent:
        """Read the rows; of a damaged journal, those before the damage.

        Raises:
            OutputError: If no row can be read.
        """
        with os_errors(self.path, "cannot be read ({})"):
            self._check_unchanged()
            if not self._end:
                return JournalContent(pa.table({}))
            content = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        return read_stream(pa.py_buffer(content), self.path)

    def restart(self, schema: pa.Schema, rows: pa.Table) -> None:
        """Replace the content atomically; the lock passes to the new file."""
        chain = 0

        def write(fd: int) -> None:
            nonlocal chain
            for part in (schema.serialize(), *(batch.serialize() for batch in rows.to_batches())):
                message, chain = sealed(part, chain)
                _write_all(fd, message)

        with os_errors(self.path, WRITING):
            self._replace(write)
        self._chain = chain

    def append(self, batch: pa.RecordBatch) -> None:
        """Write rows and sync them; on failure the journal is truncated to its previous end.

        Raises:
            OutputError: If the rows cannot be written, or another process changed the journal.
        """
        with os_errors(self.path, WRITING):
            self._check_unchanged()
            self._restore_if_removed()
            message, chain = sealed(batch.serialize(), self._chain)
            try:
                _write_all(self._fd, message)
                os.fsync(self._fd)
            except BaseException:
                os.ftruncate(self._fd, self._end)
                raise
        self._end += len(message)
        self._chain = chain

    def close(self, *, keep: bool = True) -> None:
        """Release the lock; remove the file if ``keep`` is False.

        Raises:
            OutputError: If the file cannot be removed, or was removed and cannot be written again.
        """
        try:
            if keep and os.fstat(self._fd).st_size:
                with os_errors(self.path, "was removed and cannot be written again ({})"):
                    self._restore_if_removed()
            elif _is_file_at(self.path, self._fd):
                with os_errors(self.path, "cannot be removed ({})"):
                    self.path.unlink(missing_ok=True)
        finally:
            fd, self._fd = self._fd, -1
            fcntl.flock(fd, fcntl.LOCK_UN)  # close alone keeps the lock while a forked child lives
            os.close(fd)

    @property
    def is_closed(self) -> bool:
        """True once it was closed."""
        return self._fd < 0

    def _check_unchanged(self) -> None:
        size = os.fstat(self._fd).st_size
        if size != self._end:
            raise OutputError(
                f"{self.path}: another process has changed it while this one wrote it ({size:,} "
                f"bytes, not {self._end:,}); `resume` continues from the intact rows"
            )

    def _restore_if_removed(self) -> None:
        """Write the open file to its path again if it was removed from there."""
        if _is_file_at(self.path, self._fd):
            return
        if os.path.lexists(self.path):
            raise OutputError(
                f"{self.path}: another file has replaced it, and the rows of this run are lost; "
                "run again with another `output`"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._replace(self._copy_to)

    def _copy_to(self, fd: int) -> None:
        start = 0
        while some := os.pread(self._fd, _COPIED_BYTES, start):
            _write_all(fd, some)
            start += len(some)

    def _replace(self, write: Callable[[int], None]) -> None:
        """Replace the journal by a new locked file that ``write`` has filled."""
        temporary = temporary_path(self._output)
        fd = create_temporary(self._output, [self._output, self.path])
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write(fd)
            os.fsync(fd)
            os.replace(temporary, self.path)
        except BaseException:
            os.close(fd)
            temporary.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd, self._end = fd, os.fstat(fd).st_size
        sync_folder(self.path)


def journal_path(output: Path) -> Path:
    """Return the path of an output's journal."""
    return output.with_name(output.name + ".partial")


def _open_locked(path: Path) -> int:
    """Open a journal and lock it; a file created here is removed if locking fails."""
    flags = os.O_RDWR | os.O_APPEND | NOT_FOLLOWED
    try:
        fd, is_new = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        fd, is_new = os.open(path, flags | os.O_CREAT, 0o666), False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        if is_new and not isinstance(error, BlockingIOError):
            path.unlink(missing_ok=True)
        os.close(fd)
        raise
    return fd


def _is_file_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
