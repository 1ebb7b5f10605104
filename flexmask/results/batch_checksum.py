"""Checksums the values of a record batch, independent of the buffers that hold them."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pyarrow as pa


def checksum(batch: pa.RecordBatch) -> int:
    """Return the CRC-32 of the values; equal batches have equal checksums, in any file format."""
    crc = 0
    for column in batch.columns:
        crc = _add(column, crc)
    return crc


def _add(array: Any, crc: int) -> int:
    """Extend ``crc`` by an array: its validity, the lengths of its items, and their values."""
    crc = _add_numbers(array.is_valid(), crc)
    if pa.types.is_list(array.type):
        items = array.flatten()  # without the items of null lists
        ends = array.offsets.to_numpy()
        return _add(items, zlib.crc32(np.diff(ends)[_is_valid(array)].tobytes(), crc))
    if pa.types.is_struct(array.type):
        for field in array.drop_null().flatten():
            crc = _add(field, crc)
        return crc
    if pa.types.is_string(array.type):
        texts = array.drop_null()
        _, offsets, values = texts.buffers()
        ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
        crc = zlib.crc32(np.diff(ends).tobytes(), crc)
        return zlib.crc32(memoryview(values)[ends[0] : ends[-1]], crc) if values else crc
    return _add_numbers(array.drop_null(), crc)


def _add_numbers(array: Any, crc: int) -> int:
    return zlib.crc32(array.to_numpy(zero_copy_only=False).tobytes(), crc)


def _is_valid(array: Any) -> Any:
    return array.is_valid().to_numpy(zero_copy_only=False)
