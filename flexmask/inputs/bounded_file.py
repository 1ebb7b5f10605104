"""Opens files without blocking, and reads them up to a size limit."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 64 * 2**20
"""Size limit of files that are read whole; a larger one was named by mistake."""

_DESCRIPTOR = re.compile(r"/dev/fd/(\d{1,9})|/proc/self/fd/(\d{1,9})|/dev/(stdin)")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; a pipe without a writer is refused instead of blocking.

    Raises:
        OSError: If it is not a regular file, or cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null character in the name
        raise OSError(errno.EINVAL, f"not a valid file name ({error})") from None
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_whole(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file of at most ``max_bytes``.

    Raises:
        OSError: If it is not a regular file, is longer, or cannot be read.
    """
    with open_regular(path) as file:
        return _read(file, max_bytes)


def read_whole_or_pipe(path: Path) -> bytes:
    """As `read_whole`; a pipe inherited from the shell (``<(…)``) is read to its end too."""
    fd = inherited_pipe(path)
    if fd is None:
        return read_whole(path)
    with os.fdopen(os.dup(fd), "rb") as file:
        return _read(file, MAX_BYTES)


def inherited_pipe(path: Path) -> int | None:
    """Return the descriptor of the pipe behind a path such as ``/dev/fd/63``, else None.

    A shell's ``<(…)`` is such a path. The pipe is already open, so reading it does not wait for
    a writer.
    """
    named = _DESCRIPTOR.fullmatch(str(path))
    if named is None:
        return None
    fd = int(named[1] or named[2] or 0)
    try:
        mode = os.fstat(fd).st_mode
    except OSError:  # closed; opening the path raises the error
        return None
    return fd if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else None


def _read(file: BinaryIO, max_bytes: int) -> bytes:
    content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"longer than {max_bytes:,} bytes")
    return content
