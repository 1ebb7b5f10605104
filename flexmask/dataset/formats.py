"""Formats of result files: Feather, Parquet and JSON Lines; files appear whole or not at all.

What a reader of JSON Lines takes has one object a line and nothing else, so the schema metadata,
which the other formats hold themselves, stands beside it: ``out.jsonl`` has ``out.run.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexmask.dataset.journal import WRITING, os_errors, sync_folder, temporary_path
from flexmask.dataset.schema import RUN, SCHEMA
from flexmask.errors import OutputError

_FEATHER = b"ARROW1"
_PARQUET = b"PAR1"
_STREAM = b"\xff\xff\xff\xff"


def read_rows(path: Path) -> pa.Table:
    """Read a result file of any format, or a journal up to its last whole write.

    A journal that ends before its schema does is read as a table of no columns and no rows.

    Raises:
        OutputError: If it is of no such format, or damaged.
    """
    with os_errors(path, "cannot be read ({})"):
        with path.open("rb") as file:
            start = file.read(6)
        if path.suffix == ".jsonl":
            return _whole(_read_json_lines, path)
        if start.startswith(_PARQUET):
            return _whole(_read_parquet, path)
        if not start:
            return pa.table({})
        content = pa.memory_map(str(path)).read_buffer()
    if start.startswith(_FEATHER):
        return _whole(lambda _: pa.ipc.open_file(content).read_all(), path)
    if start[:4] != _STREAM[: len(start)]:
        raise OutputError(f"{path}: not a result file")
    return _read_stream(content)


def is_result(path: Path) -> bool:
    """Whether a file says what run made it; no row is read.

    Feather and Arrow files, and journals, always count as results: what is wrong with one shows
    when it is read.
    """
    if path.suffix.lower() in (".feather", ".arrow", ".partial"):
        return True
    if path.suffix == ".jsonl":
        return _sidecar(path).exists()
    if path.suffix == ".parquet" and path.exists():
        from pyarrow.parquet import read_schema

        with suppress(pa.ArrowException, OSError):
            return RUN in (read_schema(path).metadata or {})
    return False


def write_rows(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write a result file; it replaces what stands there once it is whole.

    Args:
        path: The format follows from its extension, one of `EXTENSIONS`.
        schema: Columns, and the run in the metadata.
        tables: The rows.

    Raises:
        OutputError: If it cannot be written.
    """
    write = _WRITERS[path.suffix.lower()]
    if write is _write_json_lines:
        _replace(_sidecar(path), lambda file: file.write((schema.metadata or {})[RUN]))
    _replace(path, lambda file: write(file, schema, tables))


def _replace(path: Path, write: Callable[[BufferedWriter], object]) -> None:
    temporary = temporary_path(path)
    with os_errors(path, WRITING):
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path)


def _write_feather(file: BufferedWriter, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(file, schema, options=options) as writer:
        for table in tables:
            writer.write_table(table)


def _write_parquet(file: BufferedWriter, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    from pyarrow.parquet import ParquetWriter  # slow to import

    with ParquetWriter(file, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _write_json_lines(file: BufferedWriter, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    for table in tables:
        for row in table.to_pylist():
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


_WRITERS: Mapping[str, Callable[[BufferedWriter, pa.Schema, Iterable[pa.Table]], None]] = {
    ".feather": _write_feather,
    ".arrow": _write_feather,
    ".parquet": _write_parquet,
    ".jsonl": _write_json_lines,
}
EXTENSIONS = tuple(_WRITERS)


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".run.json")


def _whole(read: Callable[[Path], pa.Table], path: Path) -> pa.Table:
    try:
        table = read(path)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, TypeError):
        raise OutputError(f"{path}: damaged, not readable as {path.suffix}") from None
    return table


def _read_parquet(path: Path) -> pa.Table:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        table = file.read()
    if table.column_names != SCHEMA.names:
        return table
    return table.cast(SCHEMA.with_metadata(table.schema.metadata))  # Parquet renames list items


def _read_json_lines(path: Path) -> pa.Table:
    metadata = {RUN: _sidecar(path).read_bytes()} if _sidecar(path).exists() else {}
    schema = SCHEMA.with_metadata(metadata)
    with path.open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    if any(row.keys() != set(schema.names) for row in rows):
        return pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
    return pa.Table.from_pylist(rows, schema=schema)


def _read_stream(content: pa.Buffer) -> pa.Table:
    try:
        reader = pa.ipc.open_stream(content)
    except pa.ArrowInvalid:
        return pa.table({})
    batches = []
    with suppress(StopIteration, pa.ArrowException, OSError):  # the last two: it ends in a write
        while True:
            batch = reader.read_next_batch()
            batch.validate(full=True)
            batches.append(batch)
    return pa.Table.from_batches(batches, reader.schema)
