"""Crash-safe storage of Arrow rows: an append-only journal."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from flexmask.errors import OutputError
from flexmask.results.journal_stream import JournalContent, read_stream, sealed
from flexmask.results.whole_file import (
    NOT_FOLLOWED,
    WRITING,
    create_temporary,
    os_errors,
    sync_folder,
    temporary_path,
)

_COPIED_BYTES = 1 << 20


class Journal:
    """The rows that a run has finished: an Arrow IPC stream beside its output.

    It is locked while open (``flock``, advisory); the lock ends with the process, however that
    ends. The file is empty until `restart`, and an empty one does not outlive `close`. Rows are
    read from the open file, and what others do to its name does not reach them.

    Attributes:
        path: ``<output>.partial``.
    """

    def __init__(self, output: Path, fd: int) -> None:
        """Take over a locked file; `acquire` is the way to get one."""
        self.path = journal_path(output)
        self._output = output
        self._fd = fd
        self._end = os.fstat(fd).st_size
        self._chain = 0

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
                is_link = error.errno == errno.ELOOP
                reason = "a link stands there" if is_link else error.strerror
                raise OutputError(
                    f"{path}: cannot be opened and locked ({reason}); choose another place with "
                    "--output"
                ) from None
            if _stands_at(path, fd):
                return cls(output, fd)
            os.close(fd)  # its owner replaced or removed it before the lock was ours

    def read(self) -> JournalContent:
        """Its rows, those of a damaged journal up to the damage.

        Raises:
            OutputError: If none of them can be read.
        """
        with os_errors(self.path, "cannot be read ({})"):
            self._check_unchanged()
            if not self._end:
                return JournalContent(pa.table({}))
            content = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        return read_stream(pa.py_buffer(content), self.path)

    def restart(self, schema: pa.Schema, rows: pa.Table) -> None:
        """Replace what it holds, atomically; the lock passes to the new file."""
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
        """Write rows and sync them; on failure the journal ends where it ended before.

        Raises:
            OutputError: If they cannot be written, or somebody has changed the journal.
        """
        with os_errors(self.path, WRITING):
            self._check_unchanged()
            self._keep_in_place()
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
        """Let go of the lock; what was written stays unless ``keep`` is false.

        Raises:
            OutputError: If the file cannot be removed, or cannot be kept.
        """
        try:
            if keep and os.fstat(self._fd).st_size:
                with os_errors(self.path, "is gone and cannot be written again ({})"):
                    self._keep_in_place()
            elif _stands_at(self.path, self._fd):
                with os_errors(self.path, "cannot be removed ({})"):
                    self.path.unlink(missing_ok=True)
        finally:
            fd, self._fd = self._fd, -1
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing alone does not, if a forked child lives
            os.close(fd)

    def _check_unchanged(self) -> None:
        size = os.fstat(self._fd).st_size
        if size != self._end:
            raise OutputError(
                f"{self.path}: another process has changed it while this one wrote it ({size:,} "
                f"bytes, not {self._end:,}); --resume goes on from the rows that are whole"
            )

    def _keep_in_place(self) -> None:
        """Write the open file under its name again if that was removed."""
        if _stands_at(self.path, self._fd):
            return
        if os.path.lexists(self.path):
            raise OutputError(
                f"{self.path}: another file was put in its place, and the rows of this run have "
                "no name any more; choose another --output"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._replace(self._copy_to)

    def _copy_to(self, fd: int) -> None:
        start = 0
        while some := os.pread(self._fd, _COPIED_BYTES, start):
            _write_all(fd, some)
            start += len(some)

    def _replace(self, write: Callable[[int], None]) -> None:
        """Put a new locked file in place, once ``write`` has filled it."""
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
    """Where the journal of an output stands."""
    return output.with_name(output.name + ".partial")


def _open_locked(path: Path) -> int:
    """Open a journal and lock it; one that was made for that goes if it cannot be locked."""
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


def _stands_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
