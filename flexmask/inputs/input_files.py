"""Opens inputs of every kind (``--input``) as streams of rows.

A million rows need no more memory than a thousand. The kind of a file is detected from its first
bytes; CSV from the extension, or because a delimiter is given; anything else is JSON Lines. A
pipe, which can be read only once, is kept in memory.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

from flexmask.errors import RequestError
from flexmask.inputs.arrow_rows import (
    Batches,
    arrow_file_batches,
    arrow_rows,
    arrow_stream_batches,
    batch_rows,
    open_folder,
    parquet_batches,
)
from flexmask.inputs.bounded_file import inherited_pipe, open_regular
from flexmask.inputs.hub import open_hub_dataset
from flexmask.inputs.rows import KINDS, Input, as_request_errors, printable
from flexmask.inputs.text_format import OPTIONS, TextFormat
from flexmask.inputs.text_rows import (
    DELIMITERS,
    Lines,
    csv_rows,
    json_rows,
    lines_of_file,
    lines_of_pipe,
    lines_of_stdin,
)

_BATCHES_BY_MAGIC: dict[bytes, Batches] = {
    b"PAR1": parquet_batches,
    b"ARROW1": arrow_file_batches,
    b"\xff\xff\xff\xff": arrow_stream_batches,
}
_FILE_EXTENSIONS = (*DELIMITERS, ".jsonl", ".ndjson", ".json", ".parquet", ".feather", ".arrow")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_input(source: str, text: TextFormat = TextFormat()) -> Input:  # noqa: B008 (frozen)
    """Open an input; its rows are read when it is iterated over.

    Args:
        source: A file; ``-`` for JSON Lines (or CSV, if a delimiter is given) on standard input;
            a folder that the ``datasets`` library saved; or the id of a data set on the hub,
            ``owner/name``. Folder and id may be followed by ``:split``, the id also by
            ``:config:split``.
        text: Delimiter and encoding, for text files.

    Raises:
        RequestError: If ``source`` does not exist, or is of no known kind.
    """
    if source == "-":
        return _text_input("standard input", "stdin", lines_of_stdin(text), None, text)
    if not source:
        raise RequestError(f"the input has an empty name; `input` takes {KINDS}")
    path = Path(source)
    pipe = inherited_pipe(path)
    if pipe is not None:
        return _text_input(source, "pipe", lines_of_pipe(pipe, source, text), None, text)
    opened = _open_folder_or_hub(source)
    if opened is None:
        return _open_file(path, text)
    if text.is_given:
        raise _not_text(opened.name)
    return opened


def _open_folder_or_hub(source: str) -> Input | None:
    if os.path.isdir(source):
        return open_folder(Path(source), None)
    folder, _, split = source.rpartition(":")
    is_there = os.path.lexists(source)
    if folder and not is_there:
        if os.path.isdir(folder):
            return open_folder(Path(folder), split)
        if _HUB_ID.fullmatch(folder.partition(":")[0]):
            return _open_hub(folder, split)
    is_file = is_there or Path(source).suffix in _FILE_EXTENSIONS
    if not is_file and _HUB_ID.fullmatch(source):
        return _open_hub(source, None)
    return None


def _open_file(path: Path, text: TextFormat) -> Input:
    name = printable(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise RequestError(
            f"{name}: not a file but a pipe or device; send its rows to `input=-`, or write them "
            "to a file"
        )
    with as_request_errors(name), open_regular(path) as file:
        start = file.read(6)
    stem = printable(Path(path.stem))
    for magic, batches in _BATCHES_BY_MAGIC.items():
        if start.startswith(magic):
            if text.is_given:
                raise _not_text(name)
            return Input(name, stem, partial(arrow_rows, path, batches), has_fixed_columns=True)
    expected = DELIMITERS.get(path.suffix.lower())
    return _text_input(name, stem, lines_of_file(path, text), expected, text)


def _text_input(
    name: str, stem: str, lines: Lines, expected: str | None, text: TextFormat
) -> Input:
    delimiter = text.delimiter or expected
    if delimiter is None:
        return Input(name, stem, partial(json_rows, lines, name))
    read = partial(csv_rows, lines, name, delimiter, text.delimiter)
    return Input(name, stem, read, has_fixed_columns=True, advice=f"; {OPTIONS}")


def _open_hub(name: str, split: str | None) -> Input:
    dataset_id, _, config = name.partition(":")
    batches = open_hub_dataset(dataset_id, config or None, split)
    without_split = f"{dataset_id}:{config}" if config else dataset_id
    name = f"{without_split}:{split}" if split else without_split
    return Input(
        name,
        dataset_id.rpartition("/")[2],
        lambda first: batch_rows(batches(), name, first),
        lambda other: _open_hub(without_split, other),
        has_fixed_columns=True,
    )


def _not_text(name: str) -> RequestError:
    return RequestError(f"{name}: not a text file; leave out `delimiter` and `encoding`")
