"""The key-value cache: static buffers that are bound to the attention modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flexmask.attention.backend import bound_cache
from flexmask.attention.model_probe import AttentionShape


class KVCache:
    """The key-value cache of one model.

    It consists of the buffers ``key_cache`` and ``value_cache`` of each attention module,
    ``(B, H_kv, S, D)`` each, which all views of the model share.

    Attributes:
        tainted: ``(B, 1)`` bool, true where a row may hold NaN or infinity. Prefill and decode
            set it.
    """

    def __init__(
        self, views: Sequence[nn.Module], shapes: Mapping[str, AttentionShape], dtype: torch.dtype
    ) -> None:
        """Make a cache without buffers; `bind` allocates them.

        Args:
            views: Module trees of one model.
            shapes: Sizes of heads of each attention module, by its name.
            dtype: Dtype of keys and values.
        """
        self._views = views
        self._shapes = shapes
        self._dtype = dtype
        self._bound = (0, 0)
        self.tainted = torch.zeros(0, 1, dtype=torch.bool)

    def bind(self, batch_size: int, capacity: int) -> None:
        """Replace the buffers by zeros for ``batch_size`` rows of ``capacity`` slots."""
        device = next(self._views[0].parameters()).device
        self._bound = (batch_size, capacity)
        self.tainted = torch.zeros(batch_size, 1, dtype=torch.bool, device=device)
        for name, shape in self._shapes.items():
            size = (batch_size, shape.num_kv_heads, capacity)
            key = torch.zeros(*size, shape.key_dim, dtype=self._dtype, device=device)
            value = torch.zeros(*size, shape.value_dim, dtype=self._dtype, device=device)
            for view in self._views:
                module = view.get_submodule(name)
                module.register_buffer("key_cache", key, persistent=False)
                module.register_buffer("value_cache", value, persistent=False)

    def clear_if_tainted(self) -> None:
        """Fill the cache with zeros if `tainted` holds for any row; waits for the device.

        A masked slot still counts if it holds NaN: its weight is zero, and zero times NaN is NaN.
        """
        if not self.tainted.any():
            return
        self.tainted.zero_()
        for buffers in self._layers():
            for buffer in buffers:
                buffer.zero_()

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        rows, capacity = self._bound
        return rows * self.bytes_per_row(capacity)

    @property
    def most_kv_heads(self) -> int:
        """Key heads of the attention module that has the most."""
        return max(shape.num_kv_heads for shape in self._shapes.values())

    def bytes_per_row(self, capacity: int) -> int:
        """Bytes that one row of ``capacity`` slots takes."""
        values = sum(s.num_kv_heads * (s.key_dim + s.value_dim) for s in self._shapes.values())
        return values * capacity * self._dtype.itemsize

    def of_row(self, row: int, num_slots: int) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values of a row, per layer: ``(H_kv, num_slots, D)`` each."""
        return [(k[row, :, :num_slots], v[row, :, :num_slots]) for k, v in self._layers()]

    def write_spans(
        self, rows: Tensor, starts: Tensor, values: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Write the same keys and values to several spans of slots.

        Args:
            rows: ``(N,)`` batch row of each span.
            starts: ``(N,)`` first slot of each span.
            values: Keys and values per layer, ``(H_kv, P, D)`` each.
        """
        length = values[0][0].shape[1]
        slots = starts[:, None] + torch.arange(length, device=starts.device)
        for buffers, pair in zip(self._layers(), values, strict=True):
            for buffer, content in zip(buffers, pair, strict=True):
                _wide(buffer).transpose(1, 2)[rows[:, None], slots] = _wide(content).transpose(
                    0, 1
                )

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        return [bound_cache(self._views[0].get_submodule(name)) for name in self._shapes]


def _wide(values: Tensor) -> Tensor:
    """View a tensor as 64-bit integers where its last dimension allows; these copy faster."""
    is_whole = values.shape[-1] * values.element_size() % 8 == 0
    return values.view(torch.int64) if is_whole else values
