"""Writes files atomically: complete or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path

from flexmask.errors import OutputError
from flexmask.file_syncing import sync_folder

WRITING = "cannot be written ({}); finished rows are kept, `resume` continues from them"
"""Message of `os_errors` for a failed write of rows."""

NOT_FOLLOWED = os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def os_errors(path: Path, message: str) -> Iterator[None]:
    """Turn an `OSError` about ``path`` into an `OutputError`; its reason goes into ``message``."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: {message.format(error.strerror or error)}") from error


def target_of(path: Path) -> Path:
    """Return the file that a path refers to, with symbolic links resolved."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def temporary_path(path: Path) -> Path:
    """Return the path to which a file is written before it replaces ``path``."""
    return path.with_name(path.name + ".tmp")


def create_temporary(path: Path, like: Sequence[Path]) -> int:
    """Create the file at `temporary_path`, for appending.

    An existing file there, perhaps left by a killed process, is removed and never written to: it
    could be a link that leads out of the folder.

    Args:
        path: The file to be replaced.
        like: The new file gets the mode, and where permitted the owner, of the first of these
            files that exists.

    Returns:
        A file descriptor.

    Raises:
        OSError: If the file cannot be created.
    """
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)
    model = next((found for other in like if (found := _status(other)) is not None), None)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | NOT_FOLLOWED
    fd = os.open(temporary, flags, 0o666 if model is None else 0o600)
    if model is not None:
        try:
            with suppress(PermissionError):  # only root may change the owner
                os.fchown(fd, model.st_uid, model.st_gid)
            os.fchmod(fd, stat.S_IMODE(model.st_mode))
        except BaseException:
            os.close(fd)
            raise
    return fd


@contextmanager
def replacing(
    path: Path, message: str = "cannot be written ({})", like: Sequence[Path] = ()
) -> Iterator[BufferedWriter]:
    """Open a new file that replaces ``path`` atomically once it is written and synced.

    A symbolic link at ``path`` is followed. After an exception ``path`` is unchanged.

    Args:
        path: The file to replace; if it exists, the new file gets its mode.
        message: Format of the error message; the reason is filled in.
        like: Files whose mode the new one gets if ``path`` does not exist.

    Raises:
        OutputError: If the file cannot be written.
    """
    target = target_of(path)
    with os_errors(path, message):
        temporary = temporary_path(target)
        fd = create_temporary(target, [target, *like])
        try:
            with os.fdopen(fd, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(target)


def _status(path: Path) -> os.stat_result | None:
    try:
        found = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None
