"""Reads the header of a GGUF file: metadata of the model, and the layout of its tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. transformers reads the
file itself; this module checks what transformers ignores without a message.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from flexmask.checkpoint.model_name import shown
from flexmask.checkpoint.source import check_is_no_pointer
from flexmask.errors import ModelError

_FORMATS = dict(enumerate("<B <b <H <h <I <i <f <? * * <Q <q <d".split()))
_STRING, _ARRAY = 8, 9
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        metadata: Numbers and strings by key; arrays are left out.
        tensors: Name, shape, type and offset of each tensor.
        data_start: The position from which offsets count.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[tuple[str, tuple[int, ...], int, int], ...]
    data_start: int

    def of_architecture(self, key: str) -> Any:
        """Return the value of a key that begins with the architecture; None if there is none."""
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}")


def read_header(path: Path, model: str) -> GgufHeader:
    """Read a header, and check that the file contains all tensors that it lists.

    Raises:
        ModelError: If it is not a GGUF file, is incomplete, or is one part of several.
    """
    check_is_no_pointer(path, model)
    size = path.stat().st_size
    if size < 24:
        _refuse(model, "it is no GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            _refuse(model, "it is no GGUF file")
        try:
            header = _Reader(data).header()
        except (struct.error, KeyError, UnicodeDecodeError, OverflowError):
            _refuse(model, "its header is damaged or not whole; download it again")
    if header.data_start + _data_bytes(header, model) > size:
        _refuse(model, f"it ends early, at {size:,} bytes; download it again")
    if header.metadata.get("split.count", 1) > 1:
        _refuse(model, "it is one part of several; join them with llama-gguf-split --merge")
    return header


def check_rotary_embeddings(header: GgufHeader, config: Any, model: str) -> None:
    """Check that the scaling of rotary embeddings in the file is also in the config.

    transformers (5.17 to 5.24) reads this scaling for one architecture only; models of others
    would generate wrong tokens without a message.

    Raises:
        ModelError: If the config lacks it.
    """
    scaling = header.of_architecture("rope.scaling.type")
    is_scaled = scaling not in (None, "none") or any(
        name in _ROPE_TENSORS for name, *_ in header.tensors
    )
    rope = getattr(config, "rope_parameters", None) or {}
    if is_scaled and rope.get("rope_type", "default") == "default":
        _refuse(
            model,
            "it scales rotary embeddings, which transformers does not read from GGUF; load the "
            "model's safetensors",
        )


class _Reader:
    """Reads values from the beginning of a GGUF file, one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 4

    def header(self) -> GgufHeader:
        self._number("<I")  # the version; transformers refuses unknown ones
        num_tensors, num_values = self._number("<Q"), self._number("<Q")
        metadata = {}
        for _ in range(num_values):
            key = self._string()
            metadata[key] = self._value(self._number("<I"))
        tensors = []
        for _ in range(num_tensors):
            name = self._string()
            shape = tuple(self._number("<Q") for _ in range(self._number("<I")))
            tensors.append((name, shape, self._number("<I"), self._number("<Q")))
        alignment = metadata.get("general.alignment") or 32
        data_start = -(-self._at // alignment) * alignment
        return GgufHeader(metadata, tuple(tensors), data_start)

    def _number(self, format: str) -> Any:
        (value,) = struct.unpack_from(format, self._data, self._at)
        self._at += struct.calcsize(format)
        return value

    def _string(self) -> str:
        length = self._number("<Q")
        self._at += length
        if self._at > len(self._data):
            raise struct.error("a string beyond the end")
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_FORMATS[kind])
        kind, count = self._number("<I"), self._number("<Q")
        if kind in (_STRING, _ARRAY):
            for _ in range(count):
                self._value(kind)
        else:
            self._at += count * struct.calcsize(_FORMATS[kind])
        return None


def _data_bytes(header: GgufHeader, model: str) -> int:
    """Return the number of bytes that must follow the header."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    end = 0
    for name, shape, kind, offset in header.tensors:
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            _refuse(model, f"{name} is of type {kind}, which this version of gguf does not know")
        end = max(end, offset + prod(shape) // block * size)
    return end


def _refuse(model: str, reason: str) -> NoReturn:
    raise ModelError(f"cannot load model {shown(model)}: {reason}")
