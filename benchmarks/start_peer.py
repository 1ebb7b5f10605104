"""One process of transformers' generate, from its start to two tokens: a prefill and one step.

With ``--imports`` no model is loaded, and nothing but what any process that compiles a model of
transformers imports.
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module


def generate(model_path: str, device: str, attention: str, prompt_tokens: int) -> float:
    """Load a model and generate with a static cache; return the seconds after loading."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = "auto" if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=dtype, attn_implementation=attention
    )
    model = model.to(device).eval()
    started = time.perf_counter()
    prompt = torch.randint(5, model.config.vocab_size, (1, prompt_tokens)).to(device)
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
    )
    tokens.tolist()
    return time.perf_counter() - started


def main() -> None:
    """Print a line when it is done."""
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
        seconds = generate(
            arguments.model, arguments.device, arguments.attention, arguments.prompt_tokens
        )
    print(f"done in {seconds:.3f} s", flush=True)


if __name__ == "__main__":
    main()
