"""Reports what a folder of spans holds, checks its files, and prunes it. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from flexmask.errors import KVStoreError
from flexmask.kv_store.folder_description import read_description
from flexmask.kv_store.folder_files import SPAN, VANISHED, opened_file, opened_folder
from flexmask.kv_store.folder_scan import FoundFile, Removed, prune, remove_found, scan
from flexmask.kv_store.kv_format import KVFormat
from flexmask.kv_store.span_folder import THREADS, read_header, read_span
from flexmask.kv_store.span_header import LEAF_BYTES, DamagedSpan, SpanHeader


@dataclass(frozen=True)
class BadFile:
    """A file of a span that cannot be used.

    Attributes:
        path: Its path in the folder.
        reason: What is wrong with it.
        is_damaged: False if it could not be read, for example for lack of permission.
    """

    path: str
    reason: str
    is_damaged: bool


@dataclass(frozen=True)
class FolderReport:
    """The content of a folder of spans, after pruning if it was pruned.

    Attributes:
        path: The folder.
        kv_format: What its spans have in common.
        is_verified: True if all bytes were checked, and not only the headers.
        spans: Number of spans that can be used.
        tokens: Their tokens.
        num_bytes: Bytes of all files of the folder.
        oldest_use_ns: The use of a span that is longest ago, in nanoseconds since 1970; None
            without spans.
        newest_use_ns: The last use of a span.
        bad_files: Files that cannot be used; pruning has removed the damaged ones.
        temporary: Number of files that are being written, or were left by killed writers.
        foreign: Paths in the folder that are none of its own, and are left alone.
        removed: What pruning has removed; None without pruning.
    """

    path: Path
    kv_format: KVFormat
    is_verified: bool
    spans: int
    tokens: int
    num_bytes: int
    oldest_use_ns: int | None
    newest_use_ns: int | None
    bad_files: tuple[BadFile, ...]
    temporary: int
    foreign: tuple[str, ...]
    removed: Removed | None


def report(path: Path, *, is_verified: bool = False, max_bytes: int | None = None) -> FolderReport:
    """Report what a folder holds, while others may read and write it.

    Args:
        path: The folder.
        is_verified: True to check all bytes; else the headers and sizes are checked.
        max_bytes: Prune to this number of bytes, and remove damaged files; None to remove
            nothing.

    Raises:
        KVStoreError: If it is not a folder of spans, or cannot be read or pruned.
    """
    kv_format = read_description(path)
    try:
        content = scan(path)
        checked = _check_all(path, content.spans, kv_format, is_verified=is_verified)
        removed = None
        if max_bytes is not None:
            damaged = [
                file
                for file, found in checked.items()
                if isinstance(found, BadFile)
                and found.is_damaged
                and remove_found(path, file) == "removed"
            ]
            removed = replace(prune(path, scan(path), max_bytes), damaged=len(damaged))
            content = scan(path)
    except OSError as error:
        raise KVStoreError(f"{path}: {error.strerror or error}") from error
    tokens_of = {
        file.name: found.num_tokens
        for file, found in checked.items()
        if isinstance(found, SpanHeader)
    }
    spans = [file for file in content.spans if file.name in tokens_of]
    uses = sorted(file.used_ns for file in spans)
    return FolderReport(
        path=path,
        kv_format=kv_format,
        is_verified=is_verified,
        spans=len(spans),
        tokens=sum(tokens_of[file.name] for file in spans),
        num_bytes=content.num_bytes,
        oldest_use_ns=uses[0] if uses else None,
        newest_use_ns=uses[-1] if uses else None,
        bad_files=tuple(found for found in checked.values() if isinstance(found, BadFile)),
        temporary=len(content.temporary),
        foreign=content.foreign,
        removed=removed,
    )


def _check_all(
    path: Path, files: Sequence[FoundFile], kv_format: KVFormat, *, is_verified: bool
) -> dict[FoundFile, SpanHeader | BadFile | None]:
    """Return the header of each file, what is wrong with it, or None if it has vanished."""

    def check(file: FoundFile) -> SpanHeader | BadFile | None:
        return _check(path, file, kv_format, is_verified=is_verified)

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(files, pool.map(check, files), strict=True))


def _check(
    path: Path, found: FoundFile, kv_format: KVFormat, *, is_verified: bool
) -> SpanHeader | BadFile | None:
    shown = f"{found.subfolder}/{found.name}"
    match = SPAN.fullmatch(found.name)
    assert match is not None
    identity = bytes.fromhex(match["identity"])

    def allocate(header: SpanHeader) -> list[memoryview]:
        """Return the same memory for every piece of the file, one after the other."""
        buffer = memoryview(bytearray(LEAF_BYTES))
        whole, rest = divmod(kv_format.num_bytes(header.num_tokens), LEAF_BYTES)
        return [*([buffer] * whole), buffer[:rest]]

    try:
        with (
            opened_folder(path / found.subfolder) as folder,
            opened_file(found.name, folder) as (file, status),
        ):
            if is_verified:
                return read_span(file, status, identity, kv_format, allocate)
            return read_header(file, status, identity, kv_format)[0]
    except DamagedSpan as error:
        return BadFile(shown, str(error), is_damaged=True)
    except OSError as error:
        if error.errno in VANISHED:
            return None
        return BadFile(shown, f"cannot be read ({error.strerror or error})", is_damaged=False)
