"""Finds the files of a folder of spans, and removes those that were not used for longest."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from flexmask.kv_store.folder_files import (
    DESCRIPTION,
    SPAN,
    SUBFOLDER,
    TEMPORARY,
    VANISHED,
    Removal,
    opened_folder,
    remove,
)

TOP = "."
"""In place of a subfolder's name, for files that are in none."""

LEFTOVER_AGE_S = 3600
"""A temporary file that nobody has written to for so long was left by a killed process."""


@dataclass(frozen=True)
class FoundFile:
    """A file in a folder of spans.

    Attributes:
        subfolder: Name of the subfolder, or `TOP`.
        name: Its own name.
        status: Its size and times; the time of its last change is that of its last use.
    """

    subfolder: str
    name: str
    status: os.stat_result = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.status.st_size

    @property
    def used_ns(self) -> int:
        """Nanoseconds since 1970 at which it was last used."""
        return self.status.st_mtime_ns


@dataclass(frozen=True)
class FolderContent:
    """All that is in a folder of spans.

    Attributes:
        spans: Files of spans.
        temporary: Files that are being written, or were left by killed writers.
        foreign: Paths, from the folder on, of all else.
    """

    spans: tuple[FoundFile, ...]
    temporary: tuple[FoundFile, ...]
    foreign: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files that are the folder's own."""
        return sum(file.num_bytes for file in (*self.spans, *self.temporary))


@dataclass(frozen=True)
class Removed:
    """Counts of the files removed from a folder.

    Attributes:
        spans: Number of spans.
        num_bytes: Bytes of these spans and leftovers.
        leftovers: Number of temporary files of killed writers.
        left_bytes: Bytes of the folder's own files that are left.
        damaged: Number of damaged files.
    """

    spans: int
    num_bytes: int
    leftovers: int
    left_bytes: int
    damaged: int = 0


def scan(path: Path) -> FolderContent:
    """Find the files of a folder; what is removed or added meanwhile may be missing.

    Raises:
        OSError: If the folder cannot be read.
    """
    found = _Scan(path)
    with opened_folder(path, is_followed=True) as folder, os.scandir(folder) as entries:
        for entry in entries:
            if SUBFOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                found.enter(entry.name)
            elif entry.name != DESCRIPTION or not entry.is_file(follow_symlinks=False):
                found.add(entry, TOP)
    return FolderContent(tuple(found.spans), tuple(found.temporary), tuple(sorted(found.foreign)))


class _Scan:
    """The files found in a folder so far."""

    def __init__(self, path: Path) -> None:
        self.spans: list[FoundFile] = []
        self.temporary: list[FoundFile] = []
        self.foreign: list[str] = []
        self._path = path

    def enter(self, subfolder: str) -> None:
        with (
            suppress(FileNotFoundError),
            opened_folder(self._path / subfolder) as folder,
            os.scandir(folder) as entries,
        ):
            for entry in entries:
                self.add(entry, subfolder)

    def add(self, entry: os.DirEntry[str], subfolder: str) -> None:
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return
        found = FoundFile(subfolder, entry.name, status)
        is_file = stat.S_ISREG(status.st_mode)
        is_span = SPAN.fullmatch(entry.name) and entry.name.startswith(subfolder)
        if is_file and is_span:
            self.spans.append(found)
        elif is_file and TEMPORARY.fullmatch(entry.name):
            self.temporary.append(found)
        else:
            self.foreign.append(entry.name if subfolder == TOP else f"{subfolder}/{entry.name}")


def prune(path: Path, content: FolderContent, max_bytes: int) -> Removed:
    """Remove old leftovers of killed writers, then the spans that were not used for longest.

    Several processes may do so at once; a file that was used since the scan is kept.

    Args:
        path: The folder.
        content: The result of `scan`.
        max_bytes: Bytes to which the folder's own files are brought down.

    Raises:
        OSError: If a file cannot be removed.
    """
    left = content.num_bytes
    spans = leftovers = num_bytes = 0
    oldest_ns = time.time_ns() - LEFTOVER_AGE_S * 10**9
    for file in content.temporary:
        if file.used_ns < oldest_ns and remove_found(path, file) == "removed":
            left -= file.num_bytes
            leftovers += 1
            num_bytes += file.num_bytes
    for file in sorted(content.spans, key=lambda file: (file.used_ns, file.name)):
        if left <= max_bytes:
            break
        outcome = remove_found(path, file)
        if outcome != "kept":
            left -= file.num_bytes
        if outcome == "removed":
            spans += 1
            num_bytes += file.num_bytes
    return Removed(spans, num_bytes, leftovers, left)


def remove_found(path: Path, file: FoundFile) -> Removal:
    """Remove a file, unless it was used or replaced since it was found.

    Raises:
        OSError: If it cannot be removed.
    """
    try:
        with opened_folder(path / file.subfolder, is_followed=file.subfolder == TOP) as folder:
            return remove(file.name, folder, same_as=file.status)
    except OSError as error:
        if error.errno in VANISHED:
            return "gone"
        raise
