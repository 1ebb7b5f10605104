"""Keys and values of a batch, in buffers bound to the attention modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flexmask.attention.backend import bound_cache
from flexmask.attention.model_probe import AttentionShape


class KVCache:
    """The buffers ``key_cache`` and ``value_cache`` of each attention module, `(B, H_kv, S, D)`.

    Views of one model share them.

    Attributes:
        tainted: ``(B, 1)``, true where a row may hold NaN or infinity; who computes sets it.
    """

    def __init__(
        self, views: Sequence[nn.Module], shapes: Mapping[str, AttentionShape], dtype: torch.dtype
    ) -> None:
        """Bind nothing yet.

        Args:
            views: Module trees of one model.
            shapes: What each attention module needs, by its name.
            dtype: Of keys and values.
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
        """Set keys and values to zero where they are, if `tainted` says so; asks the device.

        A slot that a mask leaves out still counts if it holds NaN: zero times NaN is NaN.
        """
        if not self.tainted.any():
            return
        self.tainted.zero_()
        for buffers in self._layers():
            for buffer in buffers:
                buffer.zero_()

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers that are bound."""
        rows, capacity = self._bound
        return rows * self.bytes_per_row(capacity)

    @property
    def most_kv_heads(self) -> int:
        """Key heads of the attention module that has most."""
        return max(shape.num_kv_heads for shape in self._shapes.values())

    def bytes_per_row(self, capacity: int) -> int:
        """Bytes that one row of ``capacity`` slots takes."""
        values = sum(s.num_kv_heads * (s.key_dim + s.value_dim) for s in self._shapes.values())
        return values * capacity * self._dtype.itemsize

    def of_row(self, row: int, num_slots: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a row, per layer: ``(H_kv, num_slots, D)`` each."""
        return [(k[row, :, :num_slots], v[row, :, :num_slots]) for k, v in self._layers()]

    def write_runs(
        self, rows: Tensor, starts: Tensor, values: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Write the same keys and values to several runs of slots.

        Args:
            rows: ``(R,)`` batch row of each run.
            starts: ``(R,)`` first slot of each run.
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
    """The same bytes in fewer elements, which copy faster."""
    is_whole = values.shape[-1] * values.element_size() % 8 == 0
    return values.view(torch.int64) if is_whole else values
