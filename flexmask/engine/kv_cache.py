"""The key-value cache: static buffers that are bound to the attention modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flexmask.attention.backend import bound_cache
from flexmask.attention.key_turns import KeyTurn
from flexmask.attention.model_probe import AttentionShape
from flexmask.engine.row_loading import to_device
from flexmask.kv_store.kv_format import LayerGroup
from flexmask.kv_store.span_values import LayerGroupValues


class KVCache:
    """The key-value cache of one model.

    It consists of the buffers ``key_cache`` and ``value_cache`` of each attention module,
    ``(H_kv, B, S, D)`` each, which all views of the model share. The slots of all rows lie side
    by side, so attention can take them as one axis of ``B * S`` keys. Layers with equal heads
    share one tensor, so that one operation copies the keys of a token in all of them.
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
        self._layers: list[LayerGroupValues] = []
        self._names_by_sizes: dict[tuple[int, int, int], list[str]] = {}
        for name, shape in shapes.items():
            sizes = (shape.num_kv_heads, shape.key_dim, shape.value_dim)
            self._names_by_sizes.setdefault(sizes, []).append(name)

    def bind(self, batch_size: int, capacity: int) -> None:
        """Replace the buffers by zeros for ``batch_size`` rows of ``capacity`` slots."""
        device = next(self._views[0].parameters()).device
        self._bound = (batch_size, capacity)
        self._layers = []
        for (heads, *dims), names in self._names_by_sizes.items():
            size = (len(names), heads, batch_size * capacity)
            pair = [torch.zeros(*size, d, dtype=self._dtype, device=device) for d in dims]
            self._layers.append(LayerGroupValues(*pair))
            for number, name in enumerate(names):
                for view in self._views:
                    module = view.get_submodule(name)
                    for kind, tensor, dim in zip(("key", "value"), pair, dims, strict=True):
                        layer = _own_tensor(tensor[number], (heads, batch_size, capacity, dim))
                        module.register_buffer(f"{kind}_cache", layer, persistent=False)

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """Layers whose heads have equal sizes, by their index among the attention modules."""
        indices = {name: index for index, name in enumerate(self._shapes)}
        return tuple(
            LayerGroup(tuple(indices[name] for name in names), *sizes)
            for sizes, names in self._names_by_sizes.items()
        )

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
        caches = (bound_cache(self._views[0].get_submodule(name)) for name in self._shapes)
        return [(keys[:, row, :num_slots], values[:, row, :num_slots]) for keys, values in caches]

    def by_module(self, model: nn.Module) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Return the key and value cache of each attention module of a tree of the same model."""
        own = self._views[0].get_submodule
        return {model.get_submodule(name): bound_cache(own(name)) for name in self._shapes}

    def copy_of(self, first_slot: int, length: int) -> tuple[LayerGroupValues, ...]:
        """Copy the keys and values of slots side by side.

        Args:
            first_slot: The first one, counted over the slots of all rows.
            length: Number of slots.
        """
        slots = slice(first_slot, first_slot + length)
        return tuple(
            LayerGroupValues(group.keys[:, :, slots].clone(), group.values[:, :, slots].clone())
            for group in self._layers
        )

    def turned(
        self,
        values: Sequence[LayerGroupValues],
        turns: Mapping[str, KeyTurn],
        old_position: int,
        new_position: int,
    ) -> tuple[LayerGroupValues, ...]:
        """Turn the keys of tokens with consecutive positions to other positions.

        Args:
            values: Keys and values of ``P`` tokens, as `copy_of` returns them.
            turns: The turn of each attention module's keys, by its name.
            old_position: Position of the first token so far.
            new_position: Its new position.
        """
        steps = torch.arange(values[0].keys.shape[2], device=values[0].keys.device)
        angles = {
            turn: turn.angles(steps + old_position, steps + new_position)
            for turn in turns.values()
        }
        result = []
        for group, names in zip(values, self._names_by_sizes.values(), strict=True):
            keys = group.keys.clone()
            for turn in {turns[name] for name in names}:
                layers = [index for index, name in enumerate(names) if turns[name] is turn]
                if len(layers) == len(names):
                    keys = turn.turn(keys, angles[turn])
                else:
                    keys[layers] = turn.turn(keys[layers], angles[turn])
            result.append(LayerGroupValues(keys, group.values))
        return tuple(result)

    def write(self, first_slots: Sequence[int], values: Sequence[LayerGroupValues]) -> None:
        """Write the same keys and values to several places.

        Args:
            first_slots: First slot of each place, counted over the slots of all rows.
            values: Those of ``P`` tokens, as `copy_of` returns them.
        """
        length = values[0].keys.shape[2]
        slots: Tensor | slice = slice(first_slots[0], first_slots[0] + length)
        if len(first_slots) > 1:
            device = values[0].keys.device
            slots = to_device(torch.tensor(first_slots)[:, None] + torch.arange(length), device)
        for group, content in zip(self._layers, values, strict=True):
            for buffer, given in ((group.keys, content.keys), (group.values, content.values)):
                given = _wide(given)
                _wide(buffer)[:, :, slots] = (
                    given if isinstance(slots, slice) else given[:, :, None]
                )

    def clear(self, slots: Tensor) -> None:
        """Fill slots ``(N,)``, counted over the slots of all rows, with zeros."""
        for group in self._layers:
            for buffer in (group.keys, group.values):
                _wide(buffer).index_fill_(2, slots, 0)


def _own_tensor(storage: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a tensor over the same memory that is no view to torch.compile.

    It compiles a graph for each offset of a view into its base; each layer has another one.
    """
    own = storage.new_empty(0)
    strides = [1]
    for length in size[:0:-1]:
        strides.insert(0, strides[0] * length)
    return own.set_(storage.untyped_storage(), storage.storage_offset(), size, tuple(strides))


def _wide(values: Tensor) -> Tensor:
    """View a tensor as 64-bit integers where its last dimension allows; these copy faster."""
    is_whole = values.shape[-1] * values.element_size() % 8 == 0
    return values.view(torch.int64) if is_whole else values
