"""Reads and writes result files: Feather, Parquet and JSON Lines.

JSON Lines holds one object a line and nothing else, so the schema metadata, which the other
formats contain, goes into a sidecar file: ``out.run.json`` for ``out.jsonl``.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from io import BufferedWriter
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexmask.errors import OutputError
from flexmask.results.batch_checksum import checksum
from flexmask.results.journal_stream import JournalContent, is_stream, read_stream
from flexmask.results.schema import RUN, SCHEMAS
from flexmask.results.whole_file import WRITING, os_errors, replacing, target_of

_FEATHER = b"ARROW1"
_PARQUET = b"PAR1"
_JSON_LINES = ".jsonl"
_CHECKSUM = b"flexmask.crc32"

DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, RecursionError, AttributeError)
"""Errors that the libraries raise for damaged files."""


def read_rows(path: Path) -> JournalContent:
    """Read a result file of any format, or a journal up to its last complete write.

    Raises:
        OutputError: If the file is of no known format, or damaged.
    """
    with os_errors(path, "cannot be read ({})"), path.open("rb") as file:
        start = file.read(6)
        if path.suffix.lower() == _JSON_LINES:
            return JournalContent(_whole(_read_json_lines, path))
        if start.startswith(_PARQUET):
            return JournalContent(_whole(_read_parquet, path))
        if not start:
            return JournalContent(pa.table({}))
        content = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if start.startswith(_FEATHER):
        return JournalContent(_whole(lambda _: _read_feather(content), path))
    if not is_stream(start):
        raise OutputError(f"{path}: not a result file")
    return read_stream(content, path)


def is_result(path: Path) -> bool:
    """Return True if a file records a flexmask run; no row is read.

    Feather and Arrow files, journals and damaged Parquet files always count as results; an error
    follows when such a file is read.
    """
    if path.suffix.lower() in (".feather", ".arrow", ".partial"):
        return True
    if path.suffix.lower() == _JSON_LINES:
        return os.path.exists(sidecar_path(path))
    if path.suffix.lower() == ".parquet" and os.path.exists(path):
        from pyarrow.parquet import read_schema

        try:
            return RUN in (read_schema(path).metadata or {})
        except DAMAGE:
            return True
    return False


def write_rows(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write a result file, which replaces an existing one atomically.

    Args:
        path: Its extension, one of `EXTENSIONS`, selects the format.
        schema: The columns, with the run configuration in the metadata.
        tables: The rows.

    Raises:
        OutputError: If the file cannot be written.
    """
    write = _WRITERS[path.suffix.lower()]
    if write is _write_json_lines:
        with replacing(sidecar_path(path), WRITING, like=[path]) as file:
            file.write((schema.metadata or {})[RUN])
    with replacing(path, WRITING) as file:
        write(file, schema, tables)


def _write_feather(file: BufferedWriter, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(file, schema, options=options) as writer:
        for table in tables:
            for batch in table.to_batches():
                metadata = {_CHECKSUM: str(checksum(batch)).encode()}
                writer.write_batch(batch, custom_metadata=metadata)


def _write_parquet(file: BufferedWriter, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    from pyarrow.parquet import ParquetWriter  # slow to import

    with ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
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
    _JSON_LINES: _write_json_lines,
}
EXTENSIONS = tuple(_WRITERS)


def sidecar_path(path: Path) -> Path:
    """Return the path of a JSON Lines file's metadata: ``out.run.json`` for ``out.jsonl``."""
    target = target_of(path)
    if target.suffix == _JSON_LINES:
        return target.with_suffix(".run.json")
    return target.with_name(target.name + ".run.json")  # out.jsonl may exist beside out.JSONL


def _whole(read: Callable[[Path], pa.Table], path: Path) -> pa.Table:
    try:
        table = read(path)
        table.validate(full=True)
    except DAMAGE:
        raise OutputError(f"{path}: damaged, not readable as {path.suffix}") from None
    return table


def _read_feather(content: pa.Buffer) -> pa.Table:
    """Read and verify batches; files that other programs have rewritten carry no checksums."""
    batches = []
    with pa.ipc.open_file(content) as reader:
        for number in range(reader.num_record_batches):
            batch, metadata = reader.get_batch_with_custom_metadata(number)
            recorded = dict(metadata or {}).get(_CHECKSUM)
            if recorded is not None:
                batch.validate(full=True)
                if recorded != str(checksum(batch)).encode():
                    raise ValueError("the checksum of a batch is wrong")
            batches.append(batch)
        return pa.Table.from_batches(batches, reader.schema)


def _read_parquet(path: Path) -> pa.Table:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read()
    schema = SCHEMAS.get(tuple(table.column_names))
    if schema is None:
        return table
    return table.cast(schema.with_metadata(table.schema.metadata))  # Parquet renames list items


def _read_json_lines(path: Path) -> pa.Table:
    sidecar = sidecar_path(path)
    metadata = {RUN: sidecar.read_bytes()} if sidecar.exists() else {}
    with path.open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    for names, schema in SCHEMAS.items():
        if all(row.keys() == set(names) for row in rows):
            return pa.Table.from_pylist(rows, schema=schema.with_metadata(metadata))
    return pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
