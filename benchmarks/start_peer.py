"""Runs transformers' generate in one process until it has two tokens: a prefill and one step.

With ``--imports`` no model is loaded; the process only imports the modules that every process
imports which compiles a transformers model.
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def generate(model: PreTrainedModel, prompt: Tensor, count: int, **cache: Any) -> Tensor:
    """Generate exactly ``count`` tokens per row, with end-of-sequence tokens suppressed.

    Args:
        model: The model.
        prompt: Token ids without padding, ``(B, T)``.
        count: Tokens to generate per row.
        cache: Cache options of ``model.generate``.
    """
    untyped: Any = model  # to mypy its generate is a submodule or a tensor
    tokens: Tensor = untyped.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **cache,
    )
    return tokens


def load_and_generate(model_path: str, device: str, attention: str, prompt_tokens: int) -> float:
    """Load a model and generate with a static cache; return the seconds after loading."""
    dtype = "auto" if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=dtype, attn_implementation=attention
    )
    model = model.to(device).eval()
    started = time.perf_counter()
    prompt = torch.randint(5, model.config.vocab_size, (1, prompt_tokens)).to(device)
    generate(model, prompt, 2, cache_implementation="static").tolist()
    return time.perf_counter() - started


def main() -> None:
    """Print a line when done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--prompt-tokens", type=int, default=1016)
    arguments = parser.parse_args()
    seconds = 0.0
    if arguments.imports:
        for name in ("transformers.models.llama.modeling_llama", "torch._inductor.compile_fx"):
            import_module(name)
    else:
        seconds = load_and_generate(
            arguments.model, arguments.device, arguments.attention, arguments.prompt_tokens
        )
    print(f"done in {seconds:.3f} s", flush=True)


if __name__ == "__main__":
    main()
