"""Rows of Parquet, Feather and Arrow files, and of folders that ``datasets`` saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexmask.dataset.rows import Input, Row, as_request_errors
from flexmask.errors import RequestError

ROWS_PER_BATCH = 1024

Batches = Callable[[Path], Iterator[pa.RecordBatch]]


def arrow_rows(path: Path, batches: Batches) -> Iterator[Row]:
    """Rows of a file that ``batches`` reads."""
    numbers = count(1)
    with as_request_errors(str(path)):
        for batch in batches(path):
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                for values in batch.slice(start, ROWS_PER_BATCH).to_pylist():
                    number = next(numbers)
                    yield Row(f"{path}:{number}", number, values)


def parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Batches of a Parquet file."""
    from pyarrow.parquet import ParquetFile  # slow to import

    with ParquetFile(path, memory_map=True) as file:
        yield from file.iter_batches(batch_size=ROWS_PER_BATCH)


def arrow_file_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow file (Feather V2), mapped into memory."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def arrow_stream_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow stream, mapped into memory."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


def open_folder(folder: Path, split: str | None) -> Input:
    """Open what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote.

    It is a folder of Arrow streams, listed in ``state.json``; with splits, a folder of each.

    Raises:
        RequestError: If it is something else, or ``split`` does not name one of its splits.
    """
    splits = _json_file(folder / "dataset_dict.json").get("splits")
    if splits is None and split is None:
        return _open_saved_split(folder, folder)
    if splits is None:
        raise RequestError(f"{folder}: it has no splits, but {split!r} is asked for")
    if split is None and len(splits) == 1:
        split = splits[0]
    if split is None or split not in splits:
        asked = "which split?" if split is None else f"it has no split {split!r};"
        raise RequestError(f"{folder}: {asked} name one as {folder}:SPLIT, of {', '.join(splits)}")
    return _open_saved_split(folder / split, folder)


def _open_saved_split(folder: Path, parent: Path) -> Input:
    files = _json_file(folder / "state.json").get("_data_files")
    if not files or not (folder / "dataset_info.json").is_file():
        raise RequestError(
            f"{folder}: not a folder that the datasets library saved (Dataset.save_to_disk)"
        )
    paths = [folder / file["filename"] for file in files]

    def read() -> Iterator[Row]:
        numbers = count(1)
        for path in paths:
            for row in arrow_rows(path, arrow_stream_batches):
                number = next(numbers)
                yield Row(f"{folder}:{number}", number, row.values)

    has_splits = folder != parent
    split_of = (lambda split: open_folder(parent, split)) if has_splits else None
    return Input(str(folder), folder.resolve().name, read, split_of)


def _json_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
