"""Models of random weights at real shapes: they cost as much as trained ones."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flexmask.attention.backend import register_attention
from flexmask.demo import model_path
from flexmask.device import resolve_quantize
from flexmask.engine import Engine
from flexmask.kernels.rounded_linear import round_linear_layers
from flexmask.transformers_internals import set_attention_implementation

LLAMA_3_2_3B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TINY = LLAMA_3_2_3B | {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
SMALL = LLAMA_3_2_3B | {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048}
SMALL |= {"num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4}
SMALL |= {"head_dim": 64}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
"""The dtype that models have on each kind of device, unless another is asked for."""
DEMO: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 288,
    "intermediate_size": 800,
    "head_dim": 64,
}
DEMO |= {"num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2}
DEMO |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
SHAPES = {"llama-3.2-3b": LLAMA_3_2_3B, "100m": SMALL, "tiny": TINY, "demo": DEMO}
"""``demo`` is the shape of the bundled model."""


def random_config(shape: str) -> LlamaConfig:
    """Return the config of a shape; the model generates until the token limit."""
    return LlamaConfig(
        **SHAPES[shape],
        architectures=["LlamaForCausalLM"],
        eos_token_id=None,
        bos_token_id=None,
    )


def random_model(shape: str, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a model of random weights; on the device ``meta`` it takes no memory."""
    register_attention()
    torch.manual_seed(0)
    config = random_config(shape)
    set_attention_implementation(config, "flexmask")
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model: LlamaForCausalLM = LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    model.eval().requires_grad_(False)
    return model


def random_engine(
    shape: str, device: str, dtype: torch.dtype, quantize: str | None = None
) -> Engine:
    """Return an engine with a model of random weights and the bundled tokenizer.

    Args:
        shape: Name of the model's shape.
        device: Device.
        dtype: Dtype of the weights.
        quantize: What they are rounded to, as in `Engine.from_pretrained`.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = random_model(shape, device, dtype)
    if quantize is not None:
        target = model.device
        round_linear_layers(model, model.lm_head, resolve_quantize(quantize, target), target)
    return Engine(model, tokenizer)
