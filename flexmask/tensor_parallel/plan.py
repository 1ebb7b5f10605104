"""The tensor parallel plan of a model: which linear layers are cut, and along which dimension.

The plan is the model's own, as transformers knows it (``base_model_tp_plan`` of its config).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexmask.errors import ModelError

COLUMNS = ("colwise", "colwise_gather_output", "colwise_rep")
"""Styles of layers of whose outputs each rank computes some."""

ROWS = ("rowwise", "rowwise_split_input", "rowwise_rep")
"""Styles of layers of whose inputs each rank reads some; their outputs are summed."""

WHOLE = ("replicated_with_grad_allreduce", "embedding_rowwise", "embedding_colwise", "replicate")
"""Styles of modules that every rank holds whole. A step reads few rows of an embedding."""


@dataclass(frozen=True)
class RankOf:
    """The place of a process among those that hold a model together.

    Attributes:
        rank: Its number, from 0 on.
        size: Number of processes.
    """

    rank: int
    size: int

    def part_of(self, length: int) -> slice:
        """Return the part of ``length`` rows or columns that this rank holds.

        All parts are of one size; the last one may end beyond ``length``.
        """
        each = -(-length // self.size)
        return slice(self.rank * each, (self.rank + 1) * each)


@dataclass(frozen=True)
class CutLinear:
    """A linear layer that ranks hold parts of.

    Attributes:
        name: Its name in the model.
        module: The layer.
        style: The style of the model's plan.
    """

    name: str
    module: nn.Linear
    style: str

    @property
    def cuts_columns(self) -> bool:
        """True if each rank computes some of the outputs."""
        return self.style in COLUMNS

    @property
    def gathers(self) -> bool:
        """True if the outputs of all ranks are joined."""
        return self.style in COLUMNS[1:]

    @property
    def splits_input(self) -> bool:
        """True if each rank takes its part of an input that all of them have."""
        return self.style in ROWS[1:]


def check_plan(config: PreTrainedConfig, size: int, model: str) -> None:
    """Refuse a model without a plan, or with heads that do not divide, before it is loaded.

    Args:
        config: The config of the part that generates text.
        size: Number of ranks.
        model: The model as messages name it.

    Raises:
        ModelError: If it cannot be cut into so many parts.
    """
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    kind = config.model_type
    if not plan:
        raise ModelError(
            f"model {model} is of type {kind!r}, for which transformers has no tensor parallel "
            "plan; leave out `tensor_parallel`"
        )
    unknown = sorted({style for style in plan.values() if style not in COLUMNS + ROWS + WHOLE})
    if unknown:
        raise ModelError(
            f"model {model} is of type {kind!r}, whose tensor parallel plan asks for "
            f"{', '.join(unknown)}, which flexmask does not do; leave out `tensor_parallel`"
        )
    if not any(style == "colwise" and _is_of_attention(name) for name, style in plan.items()):
        return  # every rank computes all heads
    query_heads = getattr(config, "num_attention_heads", 0)
    key_heads = getattr(config, "num_key_value_heads", None) or query_heads
    if query_heads % size or key_heads % size:
        raise ModelError(
            f"model {model}: {query_heads} query heads and {key_heads} key heads do not divide "
            f"among {size} ranks of `tensor_parallel`"
        )


def cut_linears(model: PreTrainedModel, size: int) -> Iterator[CutLinear]:
    """Yield the layers that the model's plan cuts.

    Raises:
        ModelError: If the sizes of one do not divide.
    """
    plan: dict[str, str] = {
        name: style for name, style in model.tp_plan.items() if style not in WHOLE
    }
    patterns = {
        re.compile(re.escape(name).replace(r"\*", r"\d+")): style for name, style in plan.items()
    }
    for name, module in model.named_modules():
        style = next((style for one, style in patterns.items() if one.fullmatch(name)), None)
        if style is None:
            continue
        if not isinstance(module, nn.Linear):
            raise ModelError(
                f"{name} of {type(model).__name__} is a {type(module).__name__}, and `tensor_"
                "parallel` cuts linear layers only"
            )
        cut = CutLinear(name, module, style)
        length = module.out_features if cut.cuts_columns else module.in_features
        if length % size and not cut.gathers:
            what = "outputs" if cut.cuts_columns else "inputs"
            raise ModelError(
                f"{length} {what} of {name} do not divide among {size} ranks of `tensor_parallel`"
            )
        yield cut


def _is_of_attention(name: str) -> bool:
    return bool(re.search(r"attn|attention", name))


def is_tied(model: Any, module: nn.Module) -> bool:
    """Return True if a model's output layer has the weight of its embedding."""
    is_output = module is model.get_output_embeddings()
    return is_output and bool(model.config.get_text_config(decoder=True).tie_word_embeddings)
