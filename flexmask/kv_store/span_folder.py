"""The folder tier: one file per span, shared by runs, processes and machines."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flexmask.kv_store.counters import Counts
from flexmask.kv_store.folder_description import prepare_folder
from flexmask.kv_store.folder_files import (
    MOST_BUFFERS,
    VANISHED,
    opened_file,
    opened_folder,
    place_of,
    remaining,
    remove,
    status_of,
    touch,
    write_file,
)
from flexmask.kv_store.folder_scan import prune, scan
from flexmask.kv_store.kv_format import KVFormat
from flexmask.kv_store.span_header import (
    LARGEST_HEADER_BYTES,
    LEAF_BYTES,
    SIZE,
    DamagedSpan,
    SpanHeader,
    crc_of,
    leaves,
)

THREADS = 16
"""Most threads that read and check files, some 2 GB/s each from the page cache."""

FIRST_READ_BYTES = 4096
"""Most headers are shorter."""

SCANS_PER_BOUND = 16
"""The folder is scanned again once a process has written this fraction of its bound."""


Allocate = Callable[[SpanHeader], Sequence[memoryview]]
"""Returns memory for the tensors of a span, whose header has been read."""


class SpanFolder:
    """A folder of spans, bounded in bytes.

    Any thread may read. One thread at a time writes.

    Attributes:
        path: The folder.
        counts: Counts by the names of `FolderCounters`.
    """

    def __init__(self, path: Path, kv_format: KVFormat, max_bytes: int) -> None:
        """Open a folder; one that does not exist is made.

        Args:
            path: The folder.
            kv_format: What its spans have in common.
            max_bytes: Bound of its files' bytes.

        Raises:
            KVStoreError: If it has spans of another format, or cannot be written.
        """
        prepare_folder(path, kv_format)
        self.path = path
        self.counts = Counts()
        self._format = kv_format
        self._max_bytes = max_bytes
        self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "flexmask-spans")
        # Bytes in the folder at the last scan, and written since; None before the first scan.
        self._scanned_bytes: int | None = None
        self._written_bytes = 0

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def has(self, identity: bytes) -> bool:
        """Return True if there is a file for a span; it may be damaged."""
        subfolder, name = place_of(identity)
        try:
            with opened_folder(self.path / subfolder) as folder:
                found = status_of(name, folder)
        except OSError:
            return False
        return found is not None and stat.S_ISREG(found.st_mode)

    def touch(self, identity: bytes) -> None:
        """Record that a span is used now, for its file to be pruned later."""
        with suppress(OSError), self._opened(identity) as (file, _, _):
            touch(file)

    def read(self, identity: bytes, allocate: Allocate) -> SpanHeader | None:
        """Read the tensors of a span, and check them.

        Args:
            identity: The span's identity.
            allocate: Returns the memory to fill, in the order of `KVFormat.shapes`.

        Returns:
            What the file says of the span; None if there is no file.

        Raises:
            DamagedSpan: If the file is not what was written; it has been removed.
            OSError: If it cannot be read.
        """
        try:
            with self._opened(identity) as (file, status, folder):
                try:
                    header = read_span(file, status, identity, self._format, allocate, self._map)
                except DamagedSpan:
                    with suppress(OSError):
                        remove(place_of(identity)[1], folder, same_as=status)
                    raise
                touch(file)
                return header
        except OSError as error:
            if error.errno in VANISHED:
                return None
            raise

    def write(
        self,
        identity: bytes,
        first_position: int | None,
        num_tokens: int,
        buffers: Sequence[memoryview],
    ) -> None:
        """Write a span, unless the folder has it; the spans used longest ago make room.

        Args:
            identity: The span's identity.
            first_position: Position that its first key is rotated for; None for unrotated keys.
            num_tokens: Its number of tokens.
            buffers: The bytes of its tensors, in the order of `KVFormat.shapes`.

        Raises:
            OSError: If it cannot be written.
        """
        if self.has(identity):
            self.touch(identity)
            return
        crcs = tuple(self._map(crc_of, leaves(buffers)))
        header = SpanHeader(identity, first_position, num_tokens, crcs).to_bytes(self._format)
        num_bytes = sum(buffer.nbytes for buffer in buffers)
        if not self._makes_room(len(header) + num_bytes):
            self.counts.add(too_large=1)
        elif self._write(identity, [header, *buffers]):
            self._written_bytes += len(header) + num_bytes
            self.counts.add(bytes_in=num_bytes)

    def _write(self, identity: bytes, parts: Sequence[bytes | memoryview]) -> bool:
        """Write a file; False if there is something of its name, which stays."""
        subfolder, name = place_of(identity)
        for is_last in (False, True):
            with suppress(FileExistsError):
                (self.path / subfolder).mkdir()
            try:
                with opened_folder(self.path / subfolder) as folder:
                    if status_of(name, folder) is not None:
                        return False
                    write_file(name, folder, parts)
                    return True
            except FileNotFoundError:  # somebody removed the subfolder meanwhile
                if is_last:
                    raise
        raise AssertionError

    def _makes_room(self, num_bytes: int) -> bool:
        """Remove spans until so many bytes fit; False if they never do."""
        if num_bytes > self._max_bytes:
            return False
        if self._fits(num_bytes):
            return True
        content = scan(self.path)
        left = content.num_bytes
        if left + num_bytes > self._max_bytes:
            # Room for more than this one, so that not every write scans.
            share = self._max_bytes // SCANS_PER_BOUND
            removed = prune(self.path, content, max(0, self._max_bytes - num_bytes - share))
            self.counts.add(evictions=removed.spans)
            left = removed.left_bytes
        self._scanned_bytes, self._written_bytes = left, 0
        return left + num_bytes <= self._max_bytes

    def _fits(self, num_bytes: int) -> bool:
        """Return True if so many bytes fit by the last scan, which must not be long ago."""
        if self._scanned_bytes is None:
            return False
        if self._written_bytes > self._max_bytes // SCANS_PER_BOUND:  # others write too
            return False
        return self._scanned_bytes + self._written_bytes + num_bytes <= self._max_bytes

    @contextmanager
    def _opened(self, identity: bytes) -> Iterator[tuple[int, os.stat_result, int]]:
        """Open the file of a span; yields its descriptor and status, and its folder's."""
        subfolder, name = place_of(identity)
        with (
            opened_folder(self.path / subfolder) as folder,
            opened_file(name, folder) as (file, status),
        ):
            yield file, status, folder

    def _map(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> Iterator[Any]:
        """Call a function in several threads, as `map` would; a single call in this one."""
        return (self._pool.map if len(arguments[0]) > 1 else map)(function, *arguments)


def read_span(
    file: int,
    status: os.stat_result,
    identity: bytes,
    kv_format: KVFormat,
    allocate: Allocate,
    call: Callable[..., Iterator[Any]] = map,
) -> SpanHeader:
    """Read the tensors of a span from its open file, and check them.

    Args:
        file: The descriptor.
        status: The file's status.
        identity: The identity that it must have.
        kv_format: The format of its folder.
        allocate: As for `SpanFolder.read`.
        call: Works as `map`, perhaps in several threads.

    Raises:
        DamagedSpan: If the file is not what was written.
        OSError: If it cannot be read.
    """
    header, start = read_header(file, status, identity, kv_format)
    pieces = leaves(allocate(header))
    offsets = range(start, status.st_size, LEAF_BYTES)
    # All threads are done with the file before an error is raised and the file closed.
    crcs = list(call(lambda offset, leaf: _read_leaf(file, offset, leaf), offsets, pieces))
    for offset, crc, expected in zip(offsets, crcs, header.leaf_crcs, strict=True):
        if isinstance(crc, OSError):
            raise crc
        if crc != expected:
            raise DamagedSpan(f"a checksum is wrong, of the bytes from {offset:,} on")
    return header


def read_header(
    file: int, status: os.stat_result, identity: bytes, kv_format: KVFormat
) -> tuple[SpanHeader, int]:
    """Read the header of a span from its open file.

    Args:
        file: The descriptor.
        status: The file's status.
        identity: The identity that it must have.
        kv_format: The format of its folder.

    Returns:
        The header, and the offset at which the bytes of the tensors begin.

    Raises:
        DamagedSpan: If it is not what was written, or the file has another size.
        OSError: If it cannot be read.
    """
    beginning = os.pread(file, FIRST_READ_BYTES, 0)
    if len(beginning) < SIZE.size:
        raise DamagedSpan("it ends early")
    end = SIZE.size + SIZE.unpack_from(beginning)[0]
    if end > min(status.st_size, LARGEST_HEADER_BYTES):
        raise DamagedSpan("its header does not end in it")
    if end > len(beginning):
        beginning += os.pread(file, end - len(beginning), len(beginning))
    header = SpanHeader.from_bytes(beginning[:end], kv_format, status.st_size)
    if header.identity != identity:
        raise DamagedSpan("it is of another span")
    return header, end


def _read_leaf(file: int, offset: int, leaf: Sequence[memoryview]) -> int | OSError | None:
    """Fill memory from a file; returns its CRC-32, None if the file ends early, or the error."""
    left = list(leaf)
    try:
        while left:
            count = os.preadv(file, left[:MOST_BUFFERS], offset)
            if not count:
                return None
            offset += count
            left = remaining(left, count)
    except OSError as error:
        return error
    return crc_of(leaf)
