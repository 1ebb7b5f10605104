"""Small models with quantised weights: their folders, and layers whose projections are fused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from flexmask.demo import model_path
from flexmask.engine.fused_projections import fuse_projections
from flexmask.torch_internals import compile_graph

TOKENS = torch.arange(10, 90, 3)[None]
NUM_PROJECTIONS = 14


def save_plain(folder: Path) -> Path:
    """Write a checkpoint in float32, of sizes that every method divides."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    for file in model_path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def with_parts(
    plain: Path, folder: Path, config: dict[str, Any], split: Callable[[Tensor], dict[str, Tensor]]
) -> Path:
    """Write quantised projections, as a tool that makes checkpoints does."""
    shutil.copytree(plain, folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        parts = split(weights.pop(name)).items()
        weights |= {name.removesuffix("weight") + suffix: part for suffix, part in parts}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def fused_launches(layer: Any) -> int:
    """Compile a layer of `oracles.SHAPE` with fused projections, which must change no result.

    Returns:
        The number of launches that its projections take.
    """
    angles = torch.randn(2, 1, 16)
    arguments = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
    hidden = torch.randn(2, 1, 48)
    launches = []

    def fuse(module: Any, inputs: Any) -> Any:
        launches.append(fuse_projections(module.graph))
        module.recompile()
        return compile_graph(module, inputs, {})

    torch._dynamo.reset()
    with torch.no_grad():
        expected = layer(hidden, **arguments)
        found = torch.compile(layer, backend=fuse, fullgraph=True)(hidden, **arguments)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    (count,) = launches
    return count
