"""The byte format of a journal: an Arrow IPC stream whose messages carry checksums.

Any reader of Arrow streams reads it. A message of such a stream is a marker, the size of its
metadata, the metadata and a body. Readers skip bytes after the metadata that the size includes;
the seal is stored there::

    marker, size | metadata | flexmask, body size, CRC of the body, CRC of all before | body

The second CRC-32 is chained from the previous message, so that lost, repeated or foreign messages
are detected as well as changed bits.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from flexmask.errors import OutputError
from flexmask.results.schema import RUN

Tail = Literal["whole", "cut", "damaged"]

_HEAD = struct.Struct("<Ii")  # marker, size of the metadata
_MARKER = 0xFFFFFFFF
_SEAL = struct.Struct("<8sQI")  # name, size of the body, CRC of the body
_CRC = struct.Struct("<I")
_NAME = b"flexmask"
_SEAL_SIZE = _SEAL.size + _CRC.size  # 24: Arrow aligns messages to 8 bytes


class DamagedMessage(Exception):
    """The checksum of a message is wrong."""


class CutMessage(Exception):
    """The stream ends in the middle of a message, because its writer was killed."""


@dataclass(frozen=True)
class JournalContent:
    """The intact content of a journal.

    Attributes:
        rows: The rows before the first incomplete or damaged message.
        tail: The end of the stream: ``whole``, ``cut`` (in the middle of a write) or ``damaged``.
        dropped_bytes: Number of bytes after the rows.
    """

    rows: pa.Table
    tail: Tail = "whole"
    dropped_bytes: int = 0

    @property
    def loss(self) -> str:
        """Description of the loss, as the predicate of a sentence; empty if nothing is lost."""
        if self.tail == "whole":
            return ""
        what = "ends in the middle of a write" if self.tail == "cut" else "damaged"
        return (
            f"{what}; the {self.rows.num_rows:,} rows before that are kept, and the "
            f"{self.dropped_bytes:,} bytes after them dropped"
        )


def sealed(message: pa.Buffer, chain: int) -> tuple[bytes, int]:
    """Add the seal to a message.

    Args:
        message: Result of `pyarrow.RecordBatch.serialize`.
        chain: The chained CRC of the previous message; 0 for the first.

    Returns:
        The bytes to write, and the chained CRC of this message.
    """
    data = memoryview(message)
    marker, size = _HEAD.unpack_from(data)
    start = _HEAD.size
    metadata, body = data[start : start + size], data[start + size :]
    head = b"".join(
        [
            _HEAD.pack(marker, size + _SEAL_SIZE),
            metadata,
            _SEAL.pack(_NAME, len(body), zlib.crc32(body)),
        ]
    )
    chain = zlib.crc32(head, chain)
    return b"".join([head, _CRC.pack(chain), body]), chain


def is_stream(start: bytes) -> bool:
    """Return True if these are the first bytes of an Arrow stream."""
    return start[:4] == _HEAD.pack(_MARKER, 0)[: len(start[:4])]


def read_stream(content: pa.Buffer, path: object) -> JournalContent:
    """Read a journal up to its first incomplete or damaged message.

    A message is parsed only after its checksums are verified. A journal that ends within its
    schema is read as a table without columns and rows.

    Args:
        content: The whole file.
        path: Its name in messages.

    Raises:
        OutputError: If it is not a stream, its beginning is damaged, or it has no checksums.
    """
    view = memoryview(content)
    if not is_stream(bytes(view[:4])):
        raise OutputError(f"{path}: not a result file")
    try:
        end, chain = _checked_end(view, 0, 0)
    except CutMessage:
        return JournalContent(pa.table({}), "cut", len(view))
    except DamagedMessage:
        raise OutputError(f"{path}: {_unverifiable(content)}") from None
    schema = pa.ipc.read_schema(content.slice(0, end))
    batches: list[pa.RecordBatch] = []
    while end < len(view):
        try:
            following, chain = _checked_end(view, end, chain)
        except (CutMessage, DamagedMessage) as error:
            tail: Tail = "cut" if isinstance(error, CutMessage) else "damaged"
            rows = pa.Table.from_batches(batches, schema)
            return JournalContent(rows, tail, len(view) - end)
        batches.append(pa.ipc.read_record_batch(content.slice(end, following - end), schema))
        end = following
    return JournalContent(pa.Table.from_batches(batches, schema))


def _checked_end(view: memoryview, start: int, chain: int) -> tuple[int, int]:
    """Verify the message at ``start``; return its end and its chained CRC.

    Raises:
        CutMessage: If the stream ends before the message does.
        DamagedMessage: If a checksum is wrong.
    """
    rest = view[start:]
    if not is_stream(bytes(rest[:4])):
        raise DamagedMessage
    if len(rest) < _HEAD.size:
        raise CutMessage
    _, size = _HEAD.unpack_from(rest)
    if size < _SEAL_SIZE:
        raise DamagedMessage
    body_start = _HEAD.size + size
    if len(rest) < body_start:
        raise CutMessage
    seal_start = body_start - _SEAL_SIZE
    name, body_size, body_crc = _SEAL.unpack_from(rest, seal_start)
    chain = zlib.crc32(rest[: seal_start + _SEAL.size], chain)
    if name != _NAME or _CRC.unpack_from(rest, seal_start + _SEAL.size) != (chain,):
        raise DamagedMessage
    body = rest[body_start : body_start + body_size]
    if len(body) < body_size:
        raise CutMessage
    if zlib.crc32(body) != body_crc:
        raise DamagedMessage
    return start + body_start + body_size, chain


def _unverifiable(content: pa.Buffer) -> str:
    """Describe what is wrong with a stream whose first message has no valid seal."""
    view = memoryview(content)
    _, size = _HEAD.unpack_from(view)
    seal_start = _HEAD.size + size - _SEAL_SIZE
    if size < _SEAL_SIZE or view[seal_start : seal_start + len(_NAME)] != _NAME:
        try:
            metadata = pa.ipc.open_stream(content).schema.metadata or {}
        except (pa.ArrowException, OSError, ValueError):
            return "damaged at its beginning, so that none of its rows can be verified"
        if RUN not in metadata:
            return "not a result file, no flexmask run is recorded in it"
        return (
            "its rows cannot be verified, since it has no checksums (an earlier version of "
            "flexmask wrote it, which can go on from it)"
        )
    return "damaged at its beginning, so that none of its rows can be verified"
