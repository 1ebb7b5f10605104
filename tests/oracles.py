"""Small models, random layouts, and what a dense pass over them gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from flexmask.attention.backend import register_attention
from flexmask.engine import GenerationRun
from flexmask.engine.batch_runner import LAG, STEPS_AHEAD
from flexmask.layout import Layout, TokenizedRequest
from flexmask.request import Request
from flexmask.strategy import Strategy

SHAPE: dict[str, Any] = dict(
    vocab_size=211,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WINDOW = 48

CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**SHAPE, sliding_window=WINDOW, attn_logit_softcapping=4.0),
    "phi3": Phi3Config(**SHAPE),
    "olmo2": Olmo2Config(**SHAPE),
}


def make_model(architecture: str, implementation: str, device: str = "cpu") -> PreTrainedModel:
    """A small model of random weights, the same for every attention implementation."""
    register_attention()
    config = copy.deepcopy(CONFIGS[architecture])
    torch.manual_seed(0)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger weights than the usual initialisation: attention has to matter.
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.set_attn_implementation(implementation)
    return cast(PreTrainedModel, model.to(device).eval().requires_grad_(False))


def random_request(seed: int, prefix: int, segments: Sequence[int], tail: int) -> TokenizedRequest:
    """Random tokens of the given lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, SHAPE["vocab_size"], (count,), generator=generator).tolist())

    return TokenizedRequest(tokens(prefix), tuple(tokens(n) for n in segments), tokens(tail))


def random_words(seed: int, count: int) -> str:
    """Random words of the tests' tokenizer, in which tokens 3, 4, … are ``t3 t4 …``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SHAPE["vocab_size"], (count,), generator=generator).tolist()
    return " ".join(f"t{i}" for i in ids)


def random_text_request(seed: int, num_segments: int = 3, length: int = 12) -> Request:
    """Random words, in segments of ``length`` and more."""
    segments = tuple(random_words(100 * seed + i, length + i) for i in range(num_segments))
    return Request(segments, prefix=random_words(seed, 8), suffix="t9 t10", uuid=f"row{seed}")


def as_on_gpu(run: GenerationRun) -> GenerationRun:
    """Let a run work ahead of the host on a CPU as it does on a GPU."""
    scheduler = run._scheduler
    scheduler.overlaps = True
    scheduler._runner._lag, scheduler._runner._steps_ahead = LAG, STEPS_AHEAD
    return run


def dense_mask(strategy: Strategy, layout: Layout) -> Tensor:
    """The plain-Python oracle as a bool matrix ``(S, S)``."""
    size = range(len(layout))
    return torch.tensor([[strategy.allowed(layout, q, kv) for kv in size] for q in size])


def within_window(layout: Layout, window: int) -> Tensor:
    """Which keys lie within a sliding window of positions, as a bool matrix ``(S, S)``."""
    positions = torch.tensor(layout.position_ids)
    return positions[:, None] - positions[None, :] < window


def oracle_logits(model: PreTrainedModel, layout: Layout, dense: Tensor, near: Tensor) -> Tensor:
    """Logits ``(S, V)`` of a dense SDPA pass over the whole layout, no cache.

    Args:
        model: The model.
        layout: The tokens.
        dense: What each token sees, ``(S, S)``.
        near: What it sees in layers with a sliding window, ``(S, S)``.
    """
    masks: Tensor | dict[str, Tensor] = near[None, None]
    if hasattr(model.config, "layer_types"):
        masks = {"full_attention": dense[None, None], "sliding_attention": near[None, None]}
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([layout.token_ids], device=model.device),
            position_ids=torch.tensor([layout.position_ids], device=model.device),
            attention_mask=_additive(masks),
            use_cache=False,
        )
    return cast(Tensor, output.logits[0])


def _additive(masks: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    if isinstance(masks, dict):
        return {kind: cast(Tensor, _additive(mask)) for kind, mask in masks.items()}
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(masks.shape, device=masks.device).masked_fill(~masks, lowest)


def oracle_tokens(
    model: PreTrainedModel, strategy: Strategy, layout: Layout, count: int
) -> tuple[tuple[int, ...], Tensor]:
    """Greedy tokens, and the logits ``(count, V)`` that chose them; everything run anew each.

    What a token sees does not depend on the tokens after it, so the mask of the longest layout
    holds those of all others.
    """
    grown = layout.extended(count - 1)
    dense = near = dense_mask(strategy, grown).to(model.device)
    if (window := getattr(model.config, "sliding_window", None)) is not None:
        near = dense & within_window(grown, window).to(model.device)
    token_ids = list(layout.token_ids)
    logits = []
    for size in range(len(layout), len(grown) + 1):
        part = Layout(tuple(token_ids), grown.segment_ids[:size], grown.position_ids[:size])
        logits.append(oracle_logits(model, part, dense[:size, :size], near[:size, :size])[-1])
        token_ids.append(int(logits[-1].argmax()))
    return tuple(token_ids[len(layout) :]), torch.stack(logits)
