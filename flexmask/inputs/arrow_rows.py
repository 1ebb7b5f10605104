"""Reads rows of Parquet, Feather and Arrow files, and of folders that ``datasets`` saved."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexmask.errors import RequestError
from flexmask.inputs.bounded_file import read_whole
from flexmask.inputs.rows import Input, Row, as_request_errors, printable

ROWS_PER_BATCH = 1024

Batches = Callable[[Path], Iterator[pa.RecordBatch]]


class _Columns:
    """The columns of a record batch as Python values, each converted on first access."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.index_of = {name: index for index, name in enumerate(batch.schema.names)}
        self._batch = batch
        self._converted: dict[str, list[Any]] = {}

    def value(self, name: str, row: int) -> Any:
        if name not in self._converted:
            if self._batch.schema.names.count(name) > 1:
                raise RequestError(f"the column {name!r} occurs twice; rename one of them")
            column = self._batch.column(self.index_of[name])
            _check_buffers(column, name)
            try:
                self._converted[name] = column.to_pylist()
            # The error depends on the type: OverflowError, ValueError, KeyError, ArrowException …
            except Exception:
                return _converted_alone(column[row], name)
        return self._converted[name][row]


def _check_buffers(column: pa.Array[Any], name: str) -> None:
    """Check offsets and indices, which Arrow follows unchecked, even in a damaged file.

    Raises:
        RequestError: If one of them is outside of its buffer.
    """
    try:
        column.validate(full=True)
    except pa.ArrowException as error:
        # UTF-8 is validated after the offsets, so the other rows can be read.
        if _is_of_texts(column.type) and "UTF8" in str(error):
            return
        raise _unreadable(name, column.type, error) from None


def _is_of_texts(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_of_texts(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _converted_alone(value: pa.Scalar[Any], name: str) -> Any:
    """Convert one value of a column that holds other values that cannot be converted."""
    try:
        return value.as_py()
    except Exception as error:
        raise _unreadable(name, value.type, error) from None


def _unreadable(name: str, kind: pa.DataType, error: Exception) -> RequestError:
    reason = " ".join(str(error).split())
    return RequestError(f"the column {name!r} holds a {kind} that cannot be read ({reason})")


class _ArrowValues(Mapping[str, Any]):
    """One row of a record batch, by column name; values are converted on access."""

    def __init__(self, columns: _Columns, row: int) -> None:
        self._columns = columns
        self._row = row

    def __getitem__(self, name: str) -> Any:
        return self._columns.value(name, self._row)

    def __contains__(self, name: object) -> bool:
        return name in self._columns.index_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.index_of)

    def __len__(self) -> int:
        return len(self._columns.index_of)


def batch_rows(batches: Iterator[pa.RecordBatch], name: str, first: int = 0) -> Iterator[Row]:
    """Yield the rows of the consecutive record batches of the input ``name``.

    Args:
        batches: The batches.
        name: Name of the input.
        first: Number of rows to leave out at the beginning.
    """
    before = 0
    for batch in batches:
        start = max(0, min(first - before, batch.num_rows))
        while start < batch.num_rows:
            part = batch.slice(start, ROWS_PER_BATCH)
            columns = _Columns(part)
            for row in range(part.num_rows):
                number = before + start + row + 1
                yield Row(f"{name}:{number}", number, _ArrowValues(columns, row))
            start += part.num_rows
        before += batch.num_rows


def arrow_rows(path: Path, batches: Batches, first: int = 0) -> Iterator[Row]:
    """Yield the rows of a file that ``batches`` reads, without the first ``first``."""
    name = printable(path)
    with as_request_errors(name, None):
        yield from batch_rows(batches(path), name, first)


def parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of a Parquet file."""
    from pyarrow.parquet import ParquetFile  # slow to import

    options: dict[str, Any] = {}
    if "arrow_extensions_enabled" in signature(ParquetFile).parameters:  # since pyarrow 21
        options["arrow_extensions_enabled"] = True  # else other writers' UUIDs are read as bytes
    with _mapped(path) as source, ParquetFile(source, **options) as file:
        yield from file.iter_batches(batch_size=ROWS_PER_BATCH)


def arrow_file_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of a memory-mapped Arrow file (Feather V2)."""
    with _mapped(path) as file, pa.ipc.open_file(file) as reader:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def arrow_stream_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of a memory-mapped Arrow stream."""
    with _mapped(path) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


def _mapped(path: Path) -> pa.MemoryMappedFile:
    # As bytes, because a file name need not be UTF-8; pyarrow's type stubs lack bytes paths.
    return pa.memory_map(os.fsencode(path))  # type: ignore[arg-type]


def open_folder(folder: Path, split: str | None) -> Input:
    """Open a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote.

    It holds Arrow streams, listed in ``state.json``; a ``DatasetDict`` has one such folder per
    split.

    Raises:
        RequestError: If the folder is something else, or ``split`` is not one of its splits.
    """
    name = printable(folder)
    splits = _saved_list(folder / "dataset_dict.json", "splits")
    if splits is None and split is None:
        return _open_saved_split(folder, folder)
    if splits is None:
        raise RequestError(f"{name}: it has no splits, but {split!r} is asked for")
    if not splits or not all(isinstance(item, str) and _is_name(item) for item in splits):
        raise RequestError(
            f"{name}: its dataset_dict.json does not list the names of splits; save it again"
        )
    if split is None and len(splits) == 1:
        (split,) = splits
    if split is None or split not in splits:
        asked = "which split?" if split is None else f"it has no split {split!r};"
        raise RequestError(f"{name}: {asked} name one as {name}:SPLIT, of {', '.join(splits)}")
    return _open_saved_split(folder / split, folder)


def _open_saved_split(folder: Path, parent: Path) -> Input:
    name = printable(folder)
    files = _saved_list(folder / "state.json", "_data_files")
    if not files or not (folder / "dataset_info.json").is_file():
        raise RequestError(
            f"{name}: not a folder that the datasets library saved (Dataset.save_to_disk)"
        )
    names = [str(file.get("filename")) for file in files if isinstance(file, dict)]
    if len(names) < len(files) or not all(map(_is_arrow_file, names)):
        raise RequestError(
            f"{name}: its state.json does not list the names of data files; save it again"
        )

    def batches() -> Iterator[pa.RecordBatch]:
        for item in names:
            with as_request_errors(printable(folder / item), None):
                yield from arrow_stream_batches(folder / item)

    has_splits = folder != parent
    return Input(
        name,
        folder.resolve().name,
        lambda first: batch_rows(batches(), name, first),
        (lambda split: open_folder(parent, split)) if has_splits else None,
        has_fixed_columns=True,
    )


def _is_arrow_file(text: str) -> bool:
    return _is_name(text) and text.endswith(".arrow")


def _is_name(text: str) -> bool:
    return text == os.path.basename(text) and text not in ("", ".", "..") and "\0" not in text


def _saved_list(path: Path, key: str) -> list[Any] | None:
    """Return a list from a JSON file that ``datasets`` wrote; None if there is no such file.

    Raises:
        RequestError: If the file cannot be read, or holds no list under ``key``.
    """
    if not os.path.lexists(path):
        return None
    try:
        content = json.loads(read_whole(path))
    except OSError as error:
        raise RequestError(f"{printable(path)}: {error.strerror}; save the folder again") from None
    except (ValueError, RecursionError):
        content = None
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise RequestError(
            f"{printable(path)}: not what the datasets library writes, it has no list "
            f"{key!r}; save the folder again"
        )
    return found
