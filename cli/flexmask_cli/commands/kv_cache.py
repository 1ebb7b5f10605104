"""``flexmask kv-cache``: lists, verifies and prunes a folder of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexmask.limits import shown_bytes
from flexmask_cli.option_groups import takes_options
from flexmask_cli.option_kinds import byte_size, flag, path_argument
from flexmask_cli.options import AsJson
from flexmask_cli.render.lines import print_json, print_line, print_warnings

if TYPE_CHECKING:
    from flexmask.kv_store.folder_report import FolderReport

SHOWN_FILES = 5
"""Most files of a kind that are named; --json names all."""


@dataclass(frozen=True)
class KVCacheOptions:
    """The folder, and what to do with it."""

    folder: Annotated[
        Path,
        path_argument(metavar="FOLDER", help="A folder of keys and values (docs/kv-cache.md)."),
    ]
    verify: Annotated[
        bool,
        flag("--verify", help="Read every file and compare its checksums, not only its header."),
    ] = False
    prune: Annotated[
        int | None,
        byte_size(
            "--prune",
            help="Remove damaged files, old files of killed runs, and then the spans that were "
            "not used for longest, until the rest takes at most this size, such as 8GiB.",
        ),
    ] = None
    as_json: AsJson = False


@takes_options
def kv_cache(*, options: KVCacheOptions) -> None:
    """List what a folder of keys and values holds; verify or prune it.

    Runs may use the folder meanwhile. The exit status is 1 if files are damaged or cannot be
    read.
    """
    from flexmask.kv_store.folder_report import report

    found = report(options.folder, is_verified=options.verify, max_bytes=options.prune)
    if options.as_json:
        print_json(_fields(found))
    else:
        for line in _lines(found):
            print_line(line)
        print_warnings(_problems(found))
    if found.bad_files:
        raise typer.Exit(1)


def _fields(found: FolderReport) -> dict[str, Any]:
    return {
        "folder": str(found.path),
        **found.kv_format.record(),
        "spans": found.spans,
        "tokens": found.tokens,
        "bytes": found.num_bytes,
        "oldest_use": _time(found.oldest_use_ns),
        "newest_use": _time(found.newest_use_ns),
        "verified": found.is_verified,
        "bad_files": [asdict(file) for file in found.bad_files],
        "temporary_files": found.temporary,
        "foreign": list(found.foreign),
        "removed": None if found.removed is None else asdict(found.removed),
    }


def _lines(found: FolderReport) -> Iterator[str]:
    yield f"model       {found.kv_format.model}"
    yield f"dtype       {found.kv_format.dtype}"
    for group in found.kv_format.layer_groups:
        yield (
            f"layers      {len(group.layers)}, {group.num_kv_heads} key heads, "
            f"keys of {group.key_dim}, values of {group.value_dim}"
        )
    yield f"spans       {found.spans:,}"
    yield f"tokens      {found.tokens:,}"
    yield f"size        {shown_bytes(found.num_bytes)}"
    yield f"oldest use  {_time(found.oldest_use_ns) or '-'}"
    yield f"newest use  {_time(found.newest_use_ns) or '-'}"
    if found.is_verified:
        yield f"verified    all files; damaged or unreadable: {len(found.bad_files):,}"
    if found.removed is not None:
        yield (
            f"removed     {found.removed.spans:,} spans, {found.removed.leftovers:,} files of "
            f"killed runs, {found.removed.damaged:,} damaged files"
        )


def _problems(found: FolderReport) -> Iterator[str]:
    for file in found.bad_files[:SHOWN_FILES]:
        yield f"{file.path}: {file.reason}"
    if (more := len(found.bad_files) - SHOWN_FILES) > 0:
        yield f"{more:,} more files are damaged or cannot be read"
    if found.foreign:
        shown = ", ".join(found.foreign[:SHOWN_FILES])
        more = len(found.foreign) - SHOWN_FILES
        yield f"left alone, since flexmask did not write it: {shown}" + (
            f" and {more:,} more" if more > 0 else ""
        )


def _time(nanoseconds: int | None) -> str | None:
    if nanoseconds is None:
        return None
    return datetime.fromtimestamp(nanoseconds // 10**9, UTC).isoformat()
