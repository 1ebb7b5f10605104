"""Cuts a model into the shard of one rank: plain modules with smaller weights.

A rank's heads, keys and values follow from the sizes of its weights, so nothing else of the
engine knows that there are other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexmask.tensor_parallel.collectives import gather_over_ranks, sum_over_ranks
from flexmask.tensor_parallel.plan import CutLinear, RankOf, cut_linears, is_tied


@dataclass(frozen=True)
class Cut:
    """The part of a tensor that a rank holds: some of its rows or columns.

    Attributes:
        dim: The dimension that is cut.
        part: The part; it may end beyond the tensor, whose rows are then followed by zeros.
    """

    dim: int
    part: slice

    def of(self, whole: Any) -> Tensor:
        """Return the part of a tensor, or of a slice of a file in safetensors."""
        index = (slice(None),) * self.dim + (self.part,)
        own: Tensor = whole[index]
        missing = self.part.stop - self.part.start - own.shape[self.dim]
        if not missing:
            return own
        zeros = own.new_zeros(*own.shape[: self.dim], missing, *own.shape[self.dim + 1 :])
        return torch.cat((own, zeros), self.dim)


@dataclass(frozen=True)
class PartOfWeight:
    """Reads a rank's part of a weight from a file; stands in for a slice of safetensors.

    Attributes:
        weight: The slice of safetensors.
        cut: The rank's part.
    """

    weight: Any
    cut: Cut

    def __getitem__(self, everything: Any) -> Tensor:
        """Read the part, into memory of its own: safetensors returns a view of the whole."""
        return self.cut.of(self.weight).clone(memory_format=torch.contiguous_format)

    def get_shape(self) -> list[int]:
        """Return the sizes of the whole weight."""
        shape: list[int] = self.weight.get_shape()
        return shape

    def get_dtype(self) -> str:
        """Return the name of its dtype in the file."""
        return str(self.weight.get_dtype())


class SummedLinear(nn.Module):
    """A linear layer with some of the inputs on each rank, whose outputs are summed.

    `ModelShard` makes it. Rank 0 alone adds the bias.
    """

    def __init__(self, linear: nn.Linear, own_inputs: slice | None) -> None:
        """Wrap the rank's layer.

        Args:
            linear: The layer.
            own_inputs: The part of the input to take; None if a rank's input is that part.
        """
        super().__init__()
        self.linear = linear
        self.own_inputs = own_inputs

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., N)``, the same on all ranks."""
        output: Tensor = self.linear(x if self.own_inputs is None else x[..., self.own_inputs])
        sum_over_ranks(output)
        return output


class GatheredLinear(nn.Module):
    """A linear layer with some of the outputs on each rank, which are joined.

    `ModelShard` makes it, above all for the logits.
    """

    def __init__(self, linear: nn.Linear, out_features: int) -> None:
        """Wrap the rank's layer.

        Args:
            linear: The layer; that of the last rank may have outputs too many.
            out_features: Outputs of all ranks.
        """
        super().__init__()
        self.linear = linear
        self.out_features = out_features

    @property
    def weight(self) -> Tensor:
        """The rank's part of the weight ``(N, K)``."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., N)``, bitwise the same on all ranks."""
        gathered: Tensor = gather_over_ranks(self.linear(x))
        return gathered[..., : self.out_features]


def sums_of_pass(model: nn.Module, last_layer: nn.Module) -> tuple[int, ...] | None:
    """Return the widths of the sums over ranks in a prefill, in their order.

    Args:
        model: The model.
        last_layer: Its last layer, which ends with its keys: sums follow attention in all plans.

    Returns:
        None if it combines the ranks' outputs in other ways too.
    """
    if any(isinstance(module, GatheredLinear) for module in model.modules()):
        return None
    skipped = set(last_layer.modules())
    sums = [module for module in model.modules() if isinstance(module, SummedLinear)]
    return tuple(one.linear.out_features for one in sums if one not in skipped)


class ModelShard:
    """The shard of a model that one rank holds.

    The layers of the model's plan get the sizes of the rank's parts at once, and undefined
    weights; `complete` makes them combine the outputs of all ranks, once the weights are there.

    Attributes:
        cuts: What the rank holds of each weight, by name.
    """

    def __init__(self, model: PreTrainedModel, place: RankOf) -> None:
        """Shrink the layers of a model.

        Args:
            model: The model; its weights may be on the meta device.
            place: The rank.

        Raises:
            ModelError: If sizes do not divide.
        """
        self._model = model
        self._place = place
        self.cuts: dict[str, Cut] = {}
        self._layers = [
            (one, one.module.in_features, one.module.out_features)
            for one in cut_linears(model, place.size)
        ]
        for one, *_ in self._layers:
            if not is_tied(model, one.module):  # whose weight is the embedding's until `complete`
                self._shrink(one)

    def _shrink(self, one: CutLinear) -> None:
        module, dim = one.module, 0 if one.cuts_columns else 1
        names = ["weight"] if module.bias is None or dim else ["weight", "bias"]
        for name in names:
            whole = getattr(module, name)
            cut = Cut(dim, self._place.part_of(whole.shape[dim]))
            sizes = list(whole.shape)
            sizes[dim] = cut.part.stop - cut.part.start
            own = torch.empty(sizes, dtype=whole.dtype, device="meta")
            setattr(module, name, nn.Parameter(own, requires_grad=False))
            self.cuts[f"{one.name}.{name}"] = cut
        module.out_features, module.in_features = module.weight.shape

    def cut_of(self, name: str) -> Cut | None:
        """Return what the rank holds of a weight of a file; None for all of it.

        Args:
            name: Its name there, which may lack or add the name of the base model.
        """
        prefix = f"{self._model.base_model_prefix}."
        names = (name, prefix + name, name.removeprefix(prefix))
        return next((self.cuts[one] for one in names if one in self.cuts), None)

    def complete(self) -> None:
        """Replace the layers by ones that combine the outputs of all ranks."""
        for one, in_features, out_features in self._layers:
            module = self._own_part(one.module) if is_tied(self._model, one.module) else one.module
            if one.gathers:
                self._replace(one.name, GatheredLinear(module, out_features))
            elif not one.cuts_columns:
                if self._place.rank:
                    module.register_parameter("bias", None)
                own_inputs = self._place.part_of(in_features) if one.splits_input else None
                self._replace(one.name, SummedLinear(module, own_inputs))

    def _own_part(self, output_layer: nn.Linear) -> nn.Linear:
        """Return the rank's part of an output layer, over the memory of the embedding."""
        weight = Cut(0, self._place.part_of(output_layer.out_features)).of(output_layer.weight)
        own = nn.Linear(output_layer.in_features, len(weight), bias=False, device="meta")
        own.weight = nn.Parameter(weight, requires_grad=False)
        return own

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(self._model.get_submodule(parent), attribute, module)
