"""Names of the files in a folder of spans, and how they are opened and written.

Several processes and machines write to a folder at once. A file is written under a temporary name
of its own, synced, and renamed. Files with other names, and all that is no regular file, are left
alone: symbolic links are not followed, and pipes are not waited for.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

DESCRIPTION = "kv-cache.json"
"""Name of the file that describes what all spans of a folder have in common."""

SUBFOLDER = re.compile(r"[0-9a-f]{2}")
"""Names of subfolders: the first two digits of the identities in them."""

SPAN = re.compile(r"(?P<identity>[0-9a-f]{64})\.safetensors")
"""Names of files of spans."""

TEMPORARY = re.compile(r"\.(?:kv-cache\.json|[0-9a-f]{64}\.safetensors)\.[0-9a-f]{16}\.tmp")
"""Names of files that are being written, or were when their writer was killed."""

VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
"""Errors that mean that there is no such file, or that it is none of ours."""

Removal = Literal["removed", "gone", "kept"]
"""Removed by this call, gone before, or kept because it was used meanwhile."""

MOST_BUFFERS = 1024
"""Most buffers that POSIX systems read or write in one call."""

_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def place_of(identity: bytes) -> tuple[str, str]:
    """Return the subfolder and the name of a span's file."""
    digits = identity.hex()
    return digits[:2], f"{digits}.safetensors"


@contextmanager
def opened_folder(path: Path, *, is_followed: bool = False) -> Iterator[int]:
    """Open a folder; yields a file descriptor.

    Args:
        path: The folder.
        is_followed: True if it may be a symbolic link to a folder.

    Raises:
        OSError: If it is not a folder.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    fd = os.open(path, flags if is_followed else flags | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def opened_file(name: str, folder: int) -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file for reading; yields its descriptor and status.

    Raises:
        FileNotFoundError: If it is not a regular file.
        OSError: If it cannot be opened.
    """
    fd = os.open(name, _READING, dir_fd=folder)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a regular file", name)
        yield fd, status
    finally:
        os.close(fd)


def status_of(name: str, folder: int) -> os.stat_result | None:
    """Return the status of a file or link itself, or None if there is none."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def write_file(name: str, folder: int, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file: complete and synced, or not at all.

    Raises:
        OSError: If it cannot be written; its temporary file is removed.
    """
    temporary = f".{name}.{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o666, dir_fd=folder)
    try:
        try:
            _write_all(fd, [memoryview(part) for part in parts])
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def remaining(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return what is left of buffers, taken as one run of bytes, after the first ``count``."""
    left = list(buffers)
    while left and count >= left[0].nbytes:
        count -= left.pop(0).nbytes
    if left:
        left[0] = left[0][count:]
    return left


def touch(file: int) -> None:
    """Record that an open file was used now, if its owner lets us."""
    with suppress(OSError):
        os.utime(file)


def remove(name: str, folder: int, *, same_as: os.stat_result) -> Removal:
    """Remove a file, unless another one has its name by now or it was used since."""
    found = status_of(name, folder)
    if found is None:
        return "gone"
    if _state(found) != _state(same_as):
        return "kept"
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return "gone"
    return "removed"


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _write_all(fd: int, parts: list[memoryview]) -> None:
    """Write in few calls, after each of which a busy interpreter may keep this thread waiting."""
    while parts:
        parts = remaining(parts, os.writev(fd, parts[:MOST_BUFFERS]))
