"""The description of a folder of spans, ``kv-cache.json``: what all of them have in common."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NoReturn

from flexmask.errors import KVStoreError
from flexmask.file_syncing import sync_folder
from flexmask.kv_store.folder_files import (
    DESCRIPTION,
    TEMPORARY,
    opened_file,
    opened_folder,
    write_file,
)
from flexmask.kv_store.kv_format import FORMAT_VERSION, KVFormat

VERSION_NAME = "flexmask_kv_format"
"""Entry of the description that has the version."""

_LARGEST_BYTES = 16 << 20


def prepare_folder(path: Path, kv_format: KVFormat) -> None:
    """Make a folder for spans of a format, or check that it is one.

    Raises:
        KVStoreError: If it has spans of another format, other files, or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise KVStoreError(f"{path}: this folder cannot be written; name another")
        found = _read(path)
        if found is None:
            _write(path, kv_format)
            found = _read(path) or kv_format
    except OSError as error:
        reason = error.strerror or error
        raise KVStoreError(f"{path}: cannot hold keys and values ({reason})") from error
    if differences := kv_format.differences(found):
        raise KVStoreError(
            f"{path}: has keys and values of another model or format ({'; '.join(differences)}); "
            "name another folder"
        )


def read_description(path: Path) -> KVFormat:
    """Return the format of the spans in a folder.

    Raises:
        KVStoreError: If it is not such a folder, or of another version.
    """
    try:
        found = _read(path)
    except OSError as error:
        raise KVStoreError(f"{path}: cannot be read ({error.strerror or error})") from error
    if found is None:
        raise KVStoreError(f"{path}: not a folder of keys and values; it has no {DESCRIPTION}")
    return found


def _read(path: Path) -> KVFormat | None:
    try:
        with opened_folder(path, is_followed=True) as folder:
            content = _content(folder)
    except FileNotFoundError:
        if not path.exists():
            raise
        return None
    try:
        record = json.loads(content)
        version = record[VERSION_NAME]
        if version == FORMAT_VERSION:
            return KVFormat.from_record(record)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        _refuse_description(path, error)
    raise KVStoreError(
        f"{path}: has keys and values in version {version!r} of the format, this flexmask writes "
        f"version {FORMAT_VERSION}; name another folder"
    )


def _content(folder: int) -> bytes:
    with opened_file(DESCRIPTION, folder) as (file, _), os.fdopen(os.dup(file), "rb") as content:
        return content.read(_LARGEST_BYTES)


def _refuse_description(path: Path, error: Exception) -> NoReturn:
    raise KVStoreError(
        f"{path / DESCRIPTION}: not a description of keys and values; remove the folder, or name "
        "another"
    ) from error


def _write(path: Path, kv_format: KVFormat) -> None:
    """Write the description of a new folder.

    If another process writes one at the same time, the last one stays; spans carry a digest of
    their format, so that none is taken for one of the other's.
    """
    others = [name for name in os.listdir(path) if not TEMPORARY.fullmatch(name)]
    if others and _read(path) is None:
        raise KVStoreError(
            f"{path}: has files but no {DESCRIPTION}, so it is no folder of keys and values; name "
            "another"
        )
    if not others:
        record = {VERSION_NAME: FORMAT_VERSION, **kv_format.record()}
        with opened_folder(path, is_followed=True) as folder:
            write_file(DESCRIPTION, folder, [json.dumps(record, indent=2).encode()])
        sync_folder(path / DESCRIPTION)
