"""Inputs: what ``--input`` takes, a piece at a time.

A million rows need no more memory than a thousand. The kind of a file is told by its first
bytes, CSV by its extension; what is none of the others is JSON Lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from flexmask.dataset.arrow_rows import (
    Batches,
    arrow_file_batches,
    arrow_rows,
    arrow_stream_batches,
    open_folder,
    parquet_batches,
)
from flexmask.dataset.hub import open_hub_dataset
from flexmask.dataset.rows import Input, Row, as_request_errors
from flexmask.dataset.text_rows import DELIMITERS, StandardInput, csv_rows, json_rows

_BATCHES_BY_MAGIC: dict[bytes, Batches] = {
    b"PAR1": parquet_batches,
    b"ARROW1": arrow_file_batches,
    b"\xff\xff\xff\xff": arrow_stream_batches,
}
_FILE_EXTENSIONS = (*DELIMITERS, ".jsonl", ".ndjson", ".json", ".parquet", ".feather", ".arrow")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_input(source: str) -> Input:
    """Find the rows that ``source`` names; nothing of them is read yet.

    Args:
        source: A file; ``-`` for JSON Lines on standard input; a folder that the ``datasets``
            library saved; or the id of a data set on the hub, as ``owner/name``. Folder and id
            may be followed by ``:split``, the id also by ``:config:split``.

    Raises:
        RequestError: If there is nothing of that name, or it is of no known kind.
    """
    if source == "-":
        return Input("standard input", "stdin", StandardInput().rows)
    path = Path(source)
    if path.is_dir():
        return open_folder(path, None)
    folder, _, split = source.rpartition(":")
    if folder and not path.exists():
        if Path(folder).is_dir():
            return open_folder(Path(folder), split)
        if _HUB_ID.fullmatch(folder.partition(":")[0]):
            return _open_hub(folder, split)
    if not path.exists() and _HUB_ID.fullmatch(source) and path.suffix not in _FILE_EXTENSIONS:
        return _open_hub(source, None)
    return _open_file(path)


def _open_file(path: Path) -> Input:
    with as_request_errors(str(path)), path.open("rb") as file:
        start = file.read(6)
    for magic, batches in _BATCHES_BY_MAGIC.items():
        if start.startswith(magic):
            return Input(str(path), path.stem, partial(arrow_rows, path, batches))
    if path.suffix.lower() in DELIMITERS:
        return Input(str(path), path.stem, partial(csv_rows, path))
    return Input(str(path), path.stem, partial(json_rows, path))


def _open_hub(name: str, split: str | None) -> Input:
    dataset_id, _, config = name.partition(":")
    rows = open_hub_dataset(dataset_id, config or None, split)
    without_split = f"{dataset_id}:{config}" if config else dataset_id
    name = f"{without_split}:{split}" if split else without_split

    def read() -> Iterator[Row]:
        for number, values in enumerate(rows(), start=1):
            yield Row(f"{name}:{number}", number, values)

    stem = dataset_id.rpartition("/")[2]
    return Input(name, stem, read, lambda other: _open_hub(without_split, other))
