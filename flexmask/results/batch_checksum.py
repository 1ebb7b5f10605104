"""A checksum of the values of a record batch, whatever buffers hold them."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pyarrow as pa


def checksum(batch: pa.RecordBatch) -> int:
    """CRC-32 of the values; equal for equal batches, however they were made, stored and read."""
    crc = 0
    for column in batch.columns:
        crc = _add(column, crc)
    return crc


def _add(array: Any, crc: int) -> int:
    """Go on from ``crc`` with places that are filled, lengths, and what is in them."""
    crc = _add_numbers(array.is_valid(), crc)
    if pa.types.is_list(array.type):
        items = array.flatten()  # without those of empty places
        ends = array.offsets.to_numpy()
        return _add(items, zlib.crc32(np.diff(ends)[_filled(array)].tobytes(), crc))
    if pa.types.is_string(array.type):
        texts = array.drop_null()
        _, offsets, values = texts.buffers()
        ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
        crc = zlib.crc32(np.diff(ends).tobytes(), crc)
        return zlib.crc32(memoryview(values)[ends[0] : ends[-1]], crc) if values else crc
    return _add_numbers(array.drop_null(), crc)


def _add_numbers(array: Any, crc: int) -> int:
    return zlib.crc32(array.to_numpy(zero_copy_only=False).tobytes(), crc)


def _filled(array: Any) -> Any:
    return array.is_valid().to_numpy(zero_copy_only=False)
