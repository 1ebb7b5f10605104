"""The mask of a pass that measures how much attention each part of a prompt gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from flexmask.attention.dense_weights import dense_weights, index_axes
from flexmask.attention.model_block_mask import ModelBlockMask

if TYPE_CHECKING:
    from flexmask.attention.scaled_part import PlacedPart
    from flexmask.mod_types import MaskMod, ScoreMod

MAX_WEIGHTS = 2**25
"""Attention weights of a layer that exist at once; they take 4 bytes each."""


@dataclass
class Measurement:
    """The measurement of a pass over ``Q`` tokens of each of ``B`` rows.

    Attributes:
        slots: ``(B, Q)`` slot of each token; those of a row follow each other.
        counts: Tokens of each row; what follows them is padding.
        parts: ``(B, capacity)`` int64, the part of the prompt that each slot belongs to.
        caches: Keys and values of all slots, ``(H_kv, B or more, capacity, D)`` each, by
            attention module.
        weights: ``(B, Q, P)`` float32: weight of each part, mean over heads, sum over the layers.
        num_layers: Layers so far.
    """

    slots: Tensor
    counts: Sequence[int]
    parts: Tensor
    caches: Mapping[nn.Module, tuple[Tensor, Tensor]]
    weights: Tensor
    num_layers: int = 0


class MeasuringMask(ModelBlockMask):
    """The mask of a pass over tokens whose keys and values follow those of a prompt in the cache.

    Attention is computed densely, some queries at a time, and notes the weight of each part.
    """

    measurement: Measurement
    placed_mask: MaskMod

    @classmethod
    def for_pass(cls, measurement: Measurement, placed_mask: MaskMod) -> Self:
        """Make a mask.

        Args:
            measurement: Gets the weights.
            placed_mask: The mask of the layers, of the index of a token in its row and the slots
                of that row.
        """
        rows, length = measurement.slots.shape
        none = torch.zeros(rows, 1, 1, 1, dtype=torch.int32, device=measurement.slots.device)
        capacity = measurement.parts.shape[1]
        mask = cls.from_kv_blocks(
            none[..., 0], none, seq_lengths=(length, capacity), compute_q_blocks=False
        )
        mask.measurement, mask.placed_mask = measurement, placed_mask
        return mask

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        softcap: float | None,
        score_mod: ScoreMod | None,
        scaled_part: PlacedPart | None,
    ) -> Tensor:
        """Write keys and values to the cache, attend, and note the weight of each part.

        Args:
            module: The calling attention module.
            query: ``(B, H, Q, D)``.
            key: ``(B, H_kv, Q, D)``.
            value: ``(B, H_kv, Q, D_v)``.
            scaling: As for `dense_weights`, like all that follows.
            softcap: As above.
            score_mod: As above.
            scaled_part: As above.

        Returns:
            ``(B, Q, H, D_v)``; zeros for padding.
        """
        to = self.measurement
        key_cache, value_cache = to.caches[module]
        rows = torch.arange(len(to.slots), device=to.slots.device)
        key_cache[:, rows[:, None], to.slots] = key.transpose(0, 1)
        value_cache[:, rows[:, None], to.slots] = value.transpose(0, 1)
        output = value.new_zeros(*query.shape[:3], value.shape[-1])
        groups = query.shape[1] // key.shape[1]
        for row, (count, last) in enumerate(zip(to.counts, to.slots[:, 0].tolist(), strict=True)):
            stop = last + count
            keys = key_cache[None, :, row, :stop]
            values = value_cache[None, :, row, :stop].repeat_interleave(groups, 1).float()
            is_part = nn.functional.one_hot(to.parts[row, :stop], to.weights.shape[-1]).float()
            size = max(1, MAX_WEIGHTS // (query.shape[1] * stop))
            for some in rows.new_tensor(range(count)).split(size):
                heads = torch.zeros_like(some[:1])
                indices = index_axes(
                    rows[row], heads, some, torch.arange(stop, device=some.device)
                )
                weights = dense_weights(
                    query[row : row + 1, :, some],
                    keys,
                    self.placed_mask(*indices),
                    indices,
                    scaling=scaling,
                    softcap=softcap,
                    score_mod=score_mod,
                    scaled_part=scaled_part,
                )
                output[row, :, some] = (weights @ values)[0].to(output.dtype)
                to.weights[row, some] += weights[0].mean(0) @ is_part
        to.num_layers += 1
        return output.transpose(1, 2)
