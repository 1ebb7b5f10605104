"""Models of random weights at real shapes: they cost as much as trained ones."""

from __future__ import annotations

from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flexmask.attention.backend import register_attention
from flexmask.demo import model_path
from flexmask.device import resolve_quantize
from flexmask.engine import Engine
from flexmask.kernels.rounded_linear import round_linear_layers
from flexmask.tensor_parallel.collectives import leave_small_sums
from flexmask.tensor_parallel.plan import RankOf
from flexmask.tensor_parallel.sharding import ModelShard
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
LLAMA_3_1_8B = LLAMA_3_2_3B | {"hidden_size": 4096, "intermediate_size": 14336}
LLAMA_3_1_8B |= {"num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False}
SHAPE_32B = LLAMA_3_1_8B | {"vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648}
SHAPE_32B |= {"num_hidden_layers": 64, "num_attention_heads": 40}
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
SHAPES = {
    "llama-3.2-3b": LLAMA_3_2_3B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "32b": SHAPE_32B,
    "100m": SMALL,
    "tiny": TINY,
    "demo": DEMO,
}
"""``demo`` is the shape of the bundled model, ``32b`` that of Qwen2.5-32B, as a Llama."""


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


def random_shard(
    place: RankOf, device: torch.device, *, shape: str, dtype: torch.dtype, by_nccl: bool = False
) -> LlamaForCausalLM:
    """Return a rank's shard of a model of random weights, which are made on the device.

    Weights that every rank holds whole are the same on all.

    Args:
        place: The rank.
        device: Its device.
        shape: One of `SHAPES`.
        dtype: The dtype.
        by_nccl: Sum all tensors over the ranks by NCCL, small ones too.
    """
    if by_nccl:
        leave_small_sums()
    model = random_model(shape, "meta", dtype)
    shard = ModelShard(model, place)
    for name, weight in [*model.named_parameters(remove_duplicate=True)]:
        torch.manual_seed(crc32(name.encode()) + (place.rank if name in shard.cuts else 0))
        values = torch.ones(weight.shape, dtype=dtype, device=device)
        if weight.dim() > 1:
            values.normal_(std=0.02)
        parent, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(values, requires_grad=False)
        setattr(model.get_submodule(parent), attribute, parameter)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(device)
    shard.complete()
    return model


def random_engine(
    shape: str,
    device: str,
    dtype: torch.dtype,
    quantize: str | None = None,
    ranks: int = 1,
    *,
    by_nccl: bool = False,
) -> Engine:
    """Return an engine with a model of random weights and the bundled tokenizer.

    Args:
        shape: One of `SHAPES`.
        device: The device.
        dtype: The dtype of the weights.
        quantize: What they are rounded to, as in `Engine.from_pretrained`.
        ranks: GPUs that hold the model together, or processes on a CPU.
        by_nccl: Sum all tensors over the ranks by NCCL, small ones too.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    if ranks > 1:
        load = partial(random_shard, shape=shape, dtype=dtype, by_nccl=by_nccl)
        return Engine.of_ranks(load, tokenizer, ranks, device)
    model = random_model(shape, device, dtype)
    if quantize is not None:
        target = model.device
        round_linear_layers(model, model.lm_head, resolve_quantize(quantize, target), target)
    return Engine(model, tokenizer)
