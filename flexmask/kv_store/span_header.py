"""The header of a span's file: its bytes, and the checksums in it.

A file is a safetensors file: the size of the header in 8 bytes, the header in JSON, the bytes of
the tensors. The header's metadata has a CRC-32 of the header itself, with the digits of that
checksum as zeros, and one CRC-32 of each `LEAF_BYTES` of the tensors' bytes, so that several
threads can read and check a file.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

from flexmask.kv_store.kv_format import DTYPE_BYTES, DTYPE_CODES, FORMAT_VERSION, KVFormat

LEAF_BYTES = 4 << 20
"""Bytes of the tensors per checksum, and per read of a thread."""

IDENTITY_BYTES = 32
"""Bytes of a span's identity."""

LARGEST_HEADER_BYTES = 16 << 20
"""More than a header of 8 TB of keys and values needs."""

SIZE = struct.Struct("<Q")
"""The size of the header, at the beginning of a file."""

_BEFORE_CRC = b'{"__metadata__":{"header_crc32":"'
_CRC_START = SIZE.size + len(_BEFORE_CRC)
_CRC_END = _CRC_START + 8
_NO_POSITION = "none"


class DamagedSpan(Exception):
    """A file is not what was written for its identity; the message says what is wrong."""


@dataclass(frozen=True)
class SpanHeader:
    """The header of a span's file.

    Attributes:
        identity: The span's identity, 32 bytes.
        first_position: Position that its first key is rotated for; None for unrotated keys.
        num_tokens: Its number of tokens, ``P``.
        leaf_crcs: A CRC-32 of each `LEAF_BYTES` of the tensors' bytes.
    """

    identity: bytes
    first_position: int | None
    num_tokens: int
    leaf_crcs: tuple[int, ...]

    def to_bytes(self, kv_format: KVFormat) -> bytes:
        """Return what a file has before the bytes of its tensors."""
        position = self.first_position
        metadata = {
            "header_crc32": "0" * 8,
            "identity": self.identity.hex(),
            "first_position": _NO_POSITION if position is None else str(position),
            "num_tokens": str(self.num_tokens),
            "format": f"flexmask keys and values {FORMAT_VERSION}",
            "format_digest": kv_format.digest,
            "leaf_crc32": "".join(f"{crc:08x}" for crc in self.leaf_crcs),
        }
        header: dict[str, object] = {"__metadata__": metadata}
        end = 0
        for name, shape in kv_format.shapes(self.num_tokens):
            start, end = end, end + prod(shape) * DTYPE_BYTES[kv_format.dtype]
            dtype = DTYPE_CODES[kv_format.dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        content = SIZE.pack(len(text)) + text
        return content[:_CRC_START] + b"%08x" % zlib.crc32(content) + content[_CRC_END:]

    @classmethod
    def from_bytes(cls, content: bytes, kv_format: KVFormat, file_bytes: int) -> Self:
        """Parse what `to_bytes` returned.

        Args:
            content: The size of the header and the header.
            kv_format: The format of the folder that the file is in.
            file_bytes: The size of the whole file.

        Raises:
            DamagedSpan: If it is anything else, or the file has another size.
        """
        zeroed = content[:_CRC_START] + b"0" * 8 + content[_CRC_END:]
        if content[_CRC_START:_CRC_END] != b"%08x" % zlib.crc32(zeroed):
            raise DamagedSpan("the checksum of its header is wrong")
        try:
            metadata = json.loads(content[SIZE.size :])["__metadata__"]
            position, crcs = metadata["first_position"], metadata["leaf_crc32"]
            header = cls(
                bytes.fromhex(metadata["identity"]),
                None if position == _NO_POSITION else int(position),
                int(metadata["num_tokens"]),
                tuple(int(crcs[at : at + 8], 16) for at in range(0, len(crcs), 8)),
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DamagedSpan("its header is not one of a span") from None
        if metadata.get("format_digest") != kv_format.digest:
            raise DamagedSpan("it was written for another model or format")
        num_bytes = kv_format.num_bytes(header.num_tokens)
        has_leaves = len(header.leaf_crcs) == num_leaves(num_bytes) > 0
        if not has_leaves or header.to_bytes(kv_format) != content:
            raise DamagedSpan("its header is not one of a span of this format")
        if file_bytes != len(content) + num_bytes:
            raise DamagedSpan(f"it has {file_bytes:,} bytes, not {len(content) + num_bytes:,}")
        return header


def num_leaves(num_bytes: int) -> int:
    """Return the number of checksums of so many bytes."""
    return -(-num_bytes // LEAF_BYTES)


def leaves(buffers: Sequence[memoryview]) -> list[list[memoryview]]:
    """Cut buffers, taken as one run of bytes, into pieces of `LEAF_BYTES` and a last one."""
    found: list[list[memoryview]] = []
    room = 0
    for buffer in buffers:
        while buffer.nbytes:
            if not room:
                found.append([])
                room = LEAF_BYTES
            piece = buffer[:room]
            found[-1].append(piece)
            room -= piece.nbytes
            buffer = buffer[piece.nbytes :]
    return found


def crc_of(pieces: Sequence[memoryview]) -> int:
    """Return the CRC-32 of pieces, taken as one run of bytes."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc
