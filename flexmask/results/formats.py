"""Reads and writes result files: Feather, Parquet and JSON Lines.

JSON Lines holds one object a line and nothing else, so the schema metadata, which the other
formats contain, goes into a sidecar file: ``out.run.json`` for ``out.jsonl``.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexmask.errors import OutputError
from flexmask.results.batch_checksum import checksum
from flexmask.results.journal_stream import JournalContent, is_stream, read_stream
from flexmask.results.run_config import RunConfig
from flexmask.results.schema import RUN, SCHEMA, SCHEMAS, recorded_schema
from flexmask.results.whole_file import WRITING, os_errors, replacing, target_of

_FEATHER = b"ARROW1"
_PARQUET = b"PAR1"
_JSON_LINES = ".jsonl"
_CHECKSUM = b"flexmask.crc32"

ROWS_PER_BATCH = 4096
"""Rows of a result file that are written together."""

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


@dataclass(frozen=True)
class StoredRows:
    """The rows of a complete result file, read some at a time.

    Attributes:
        path: The file.
        schema: Its columns, with the run configuration in the metadata.
        read: Reads and verifies the record batches, from the first.
    """

    path: Path
    schema: pa.Schema
    read: Callable[[], Iterator[pa.RecordBatch]]

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """Iterate from the first batch.

        Raises:
            OutputError: If the file is damaged, or of other columns than flexmask writes.
        """
        is_known = any(self.schema.equals(schema) for schema in SCHEMAS.values())
        try:
            for batch in self.read():
                batch.validate(full=True)
                if not (is_known and batch.schema.equals(self.schema)):
                    raise ValueError("other columns")
                yield batch
        except DAMAGE:
            raise _damaged(self.path) from None


def open_rows(path: Path) -> StoredRows:
    """Open a complete result file of any format; only its schema is read.

    Raises:
        OutputError: If it cannot be read, is of no known format, or damaged.
    """
    with os_errors(path, "cannot be read ({})"), path.open("rb") as file:
        start = file.read(6)
    is_json_lines = path.suffix.lower() == _JSON_LINES
    if not is_json_lines and not start.startswith((_FEATHER, _PARQUET)):
        raise OutputError(f"{path}: not a result file")
    try:
        if is_json_lines:
            schema = _json_lines_schema(path)
            return StoredRows(path, schema, lambda: _json_lines_batches(path, schema))
        if start.startswith(_PARQUET):
            from pyarrow.parquet import read_schema  # slow to import

            stored = read_schema(path)
            schema = SCHEMAS.get(tuple(stored.names), SCHEMA).with_metadata(stored.metadata)
            return StoredRows(path, schema, lambda: _parquet_batches(path, schema))
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            return StoredRows(path, reader.schema, lambda: _mapped_feather_batches(path))
    except DAMAGE:
        raise _damaged(path) from None


def _mapped_feather_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
        yield from _feather_batches(reader)


def _parquet_batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    from pyarrow.parquet import ParquetFile  # slow to import

    with ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(ROWS_PER_BATCH):
            yield from pa.Table.from_batches([batch]).cast(schema).to_batches()


def _json_lines_batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with path.open(encoding="utf-8") as file:
        rows = map(json.loads, file)
        while some := list(islice(rows, ROWS_PER_BATCH)):
            if any(row.keys() != set(schema.names) for row in some):
                raise ValueError("other columns")
            yield pa.RecordBatch.from_pylist(some, schema=schema)


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
    with replacing(path, WRITING) as file:
        write(file, schema, tables)
        if write is _write_json_lines:  # only now, since the rows may be damaged
            with replacing(sidecar_path(path), WRITING, like=[path]) as sidecar:
                sidecar.write((schema.metadata or {})[RUN])


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
        raise _damaged(path) from None
    return table


def _damaged(path: Path) -> OutputError:
    return OutputError(f"{path}: damaged, not readable as {path.suffix}")


def _read_feather(content: pa.Buffer) -> pa.Table:
    with pa.ipc.open_file(content) as reader:
        return pa.Table.from_batches(_feather_batches(reader), reader.schema)


def _feather_batches(reader: pa.RecordBatchFileReader) -> Iterator[pa.RecordBatch]:
    """Read and verify batches; files that other programs have rewritten carry no checksums."""
    for number in range(reader.num_record_batches):
        batch, metadata = reader.get_batch_with_custom_metadata(number)
        recorded = dict(metadata or {}).get(_CHECKSUM)
        if recorded is not None:
            batch.validate(full=True)
            if recorded != str(checksum(batch)).encode():
                raise ValueError("the checksum of a batch is wrong")
        yield batch


def _read_parquet(path: Path) -> pa.Table:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read()
    schema = SCHEMAS.get(tuple(table.column_names))
    if schema is None:
        return table
    return table.cast(schema.with_metadata(table.schema.metadata))  # Parquet renames list items


def _read_json_lines(path: Path) -> pa.Table:
    with path.open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    metadata = _sidecar_metadata(path)
    if not rows:
        return _json_lines_schema(path).empty_table()
    schema = _schema_with(rows[0])
    if schema is None or any(row.keys() != set(schema.names) for row in rows):
        return pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
    return pa.Table.from_pylist(rows, schema=schema.with_metadata(metadata))


def _json_lines_schema(path: Path) -> pa.Schema:
    """Return the columns of a file by its first row, or by its metadata where there is none."""
    metadata = _sidecar_metadata(path)
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    if first:
        schema = _schema_with(json.loads(first)) or SCHEMA
    else:
        run = RunConfig.from_json(metadata[RUN]).run if RUN in metadata else {}
        schema = recorded_schema(run)
    return schema.with_metadata(metadata)


def _schema_with(names: Collection[str]) -> pa.Schema | None:
    """Return the schema of result files that has these columns, in any order."""
    return next((each for each in SCHEMAS.values() if set(each.names) == set(names)), None)


def _sidecar_metadata(path: Path) -> dict[bytes, bytes]:
    sidecar = sidecar_path(path)
    return {RUN: sidecar.read_bytes()} if sidecar.exists() else {}
