"""Crash-safe storage of Arrow rows: an append-only journal, and files that appear whole."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from flexmask.errors import OutputError

_FILE_START = b"ARROW1"
_STREAM_START = b"\xff\xff\xff\xff"
_READING = "cannot be read ({})"
_WRITING = "cannot be written ({}); finished rows are kept, --resume goes on from them"


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
        temporary = _temporary_path(self._output)
        with _os_errors(self.path, _WRITING):
            fd = _open_locked(temporary, os.O_TRUNC)
            try:
                _write_all(fd, schema.serialize())
                for batch in rows.combine_chunks().to_batches():
                    _write_all(fd, batch.serialize())
                os.fsync(fd)
                os.replace(temporary, self.path)
            except BaseException:
                os.close(fd)
                temporary.unlink(missing_ok=True)
                raise
            os.close(self._fd)
            self._fd = fd
            _sync_folder(self.path)

    def append(self, batch: pa.RecordBatch) -> None:
        """Write rows and sync them; on failure the journal ends where it ended before."""
        with _os_errors(self.path, _WRITING):
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
                with _os_errors(self.path, "cannot be removed ({})"):
                    self.path.unlink(missing_ok=True)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing alone does not, if a forked child lives
            os.close(fd)


def journal_path(output: Path) -> Path:
    """Where the journal of an output stands."""
    return output.with_name(output.name + ".partial")


def read_rows(path: Path) -> pa.Table:
    """Read an Arrow file, or a journal up to its last whole write.

    A journal that ends before its schema does is read as a table of no columns and no rows.

    Raises:
        OutputError: If it is no Arrow file, or is damaged.
    """
    with _os_errors(path, _READING):
        content = path.read_bytes()
    if content.startswith(_FILE_START):
        return _read_file(content, path)
    if content[:4] != _STREAM_START[: len(content)]:
        raise OutputError(f"{path}: not an Arrow file; move it away or choose another --output")
    return _read_stream(content)


def write_rows(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write an Arrow file (Feather V2); it replaces what stands there once it is whole.

    Raises:
        OutputError: If it cannot be written.
    """
    temporary = _temporary_path(path)
    with _os_errors(path, _WRITING):
        try:
            with temporary.open("wb") as file:
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                with pa.ipc.new_file(file, schema, options=options) as writer:
                    for table in tables:
                        writer.write_table(table)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path)


@contextmanager
def _os_errors(path: Path, message: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: {message.format(error.strerror or error)}") from error


def _read_file(content: bytes, path: Path) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError):
        raise OutputError(
            f"{path}: damaged, not readable as an Arrow file; pass --overwrite to start again"
        ) from None
    return table


def _read_stream(content: bytes) -> pa.Table:
    try:
        reader = pa.ipc.open_stream(pa.py_buffer(content))
    except pa.ArrowInvalid:
        return pa.table({})
    batches = []
    with suppress(StopIteration, pa.ArrowException, OSError):  # the last two: it ends in a write
        while True:
            batch = reader.read_next_batch()
            batch.validate(full=True)
            batches.append(batch)
    return pa.Table.from_batches(batches, reader.schema)


def _temporary_path(output: Path) -> Path:
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


def _sync_folder(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems do not sync folders
            os.fsync(fd)
    finally:
        os.close(fd)
