"""The format of keys and values: what all spans of a store have in common."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self, TypeVar

from flexmask.record_differences import differences

FORMAT_VERSION = 1
"""Version of the folder and of the files in it; another one is refused."""

DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of dtypes in safetensors, by their names in torch."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

T = TypeVar("T")

_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose keys and values have equal shapes, and are stored in one tensor each.

    Attributes:
        layers: Indices of the ``L`` layers, in the order of the tensors' first dimension.
        num_kv_heads: Key heads per layer.
        key_dim: Size of a key per head.
        value_dim: Size of a value per head.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: If there is no layer, or a size is not positive.
        """
        if not self.layers or min(self.num_kv_heads, self.key_dim, self.value_dim) < 1:
            raise ValueError(f"a group of layers must have layers, heads and sizes, got {self}")

    def shapes(self, num_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of keys and values: ``(L, H_kv, P, D)`` and ``(L, H_kv, P, D_v)``."""
        heads = (len(self.layers), self.num_kv_heads, num_tokens)
        return (*heads, self.key_dim), (*heads, self.value_dim)


@dataclass(frozen=True)
class KVFormat:
    """The properties that all spans of a store share: those of the model and of this format.

    Attributes:
        model: Name of the model, for listings; it is not compared, since a folder may be moved.
        model_files: Identity of the model, for example its commit or a digest of each file.
        dtype: Dtype of keys and values: float32, bfloat16 or float16.
        layer_groups: The layers.
        rotary: Parameters of rotary embeddings, and all else that keys and values depend on beside
            the model and the tokens, as JSON values.
    """

    model: str
    model_files: Mapping[str, str]
    dtype: str
    layer_groups: tuple[LayerGroup, ...]
    rotary: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Check the dtype and that there are layers.

        Raises:
            ValueError: If the dtype cannot be stored, or there are no layers.
        """
        if self.dtype not in DTYPE_CODES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_CODES)}, got {self.dtype!r}")
        if not self.layer_groups:
            raise ValueError("a format of keys and values must have layers")

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Make a format of what `record` returned.

        Raises:
            ValueError: If it is something else.
        """
        try:
            return cls(
                _checked(record["model"], str),
                _checked(record["model_files"], dict),
                _checked(record["dtype"], str),
                tuple(map(_group, record["layer_groups"].values())),
                _checked(record["rotary"], dict),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("not a format of keys and values") from error

    def record(self) -> dict[str, Any]:
        """Return the format as JSON values."""
        return {
            "model": self.model,
            "model_files": dict(self.model_files),
            "dtype": self.dtype,
            "layer_groups": {
                str(number): {
                    "layers": _ranges(group.layers),
                    "num_kv_heads": group.num_kv_heads,
                    "key_dim": group.key_dim,
                    "value_dim": group.value_dim,
                }
                for number, group in enumerate(self.layer_groups)
            },
            "rotary": dict(self.rotary),
        }

    @property
    def digest(self) -> str:
        """A digest of all but the model's name, in 32 hexadecimal digits."""
        text = json.dumps(self._compared(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def differences(self, earlier: KVFormat) -> list[str]:
        """Return what differs from an earlier format, such as ``dtype: 'float16' → 'float32'``."""
        return differences(earlier._compared(), self._compared())

    def shapes(self, num_tokens: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of each tensor of a span, in the order of its bytes in a file."""
        for number, group in enumerate(self.layer_groups):
            keys, values = group.shapes(num_tokens)
            yield f"keys.{number}", keys
            yield f"values.{number}", values

    def num_bytes(self, num_tokens: int) -> int:
        """Return the bytes of the tensors of a span."""
        sizes = (prod(shape) for _, shape in self.shapes(num_tokens))
        return sum(sizes) * DTYPE_BYTES[self.dtype]

    def _compared(self) -> dict[str, Any]:
        record = self.record()
        del record["model"]
        return {"format_version": FORMAT_VERSION, **record}


def _group(record: Mapping[str, Any]) -> LayerGroup:
    names = ("num_kv_heads", "key_dim", "value_dim")
    return LayerGroup(_indices(record["layers"]), *(_checked(record[name], int) for name in names))


def _checked(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _ranges(layers: Sequence[int]) -> str:
    """Return indices as text: ``0-3,6`` for 0, 1, 2, 3 and 6."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _indices(ranges: str) -> tuple[int, ...]:
    found: list[int] = []
    for text in ranges.split(","):
        if not (match := _RANGE.fullmatch(text)):
            raise TypeError(f"{text!r} is no range of layers")
        first, last = int(match[1]), int(match[2] or match[1])
        found += range(first, last + 1)
    return tuple(found)
