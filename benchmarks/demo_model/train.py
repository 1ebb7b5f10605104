r"""Train the demo model: ``python -m demo_model.train --output DIR``, run in benchmarks/.

Writes ``DIR/questions.jsonl`` and ``DIR/model``: a Llama, its tokenizer, and ``training.json``
with the configuration and the accuracy. Prints the accuracy table. The same seed on the same
machine gives the same weights and questions.

The model is a plain causal language model of few-shot text: rows of ``Q: …\nA: …`` pairs on facts
drawn at random. It never sees several paraphrases of a question side by side.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_model.corpus import encode, encode_pairs, make_batches, train_tokenizer
from demo_model.evaluate import evaluate
from demo_model.train_config import ModelShape, TrainConfig
from demo_model.world import (
    Noise,
    format_questions,
    make_questions,
    make_training_pairs,
    make_world,
)


def build_model(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama with initial weights, whose generation also ends at a newline."""
    config = LlamaConfig(
        **asdict(shape),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, *encode(tokenizer, "\n")],
        pad_token_id=config.pad_token_id,
    )
    return model


def weighted_loss(
    hidden: torch.Tensor, vocabulary: torch.Tensor, token_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted mean of the next-token loss.

    Args:
        hidden: Last hidden states, ``(B, S, hidden_size)``.
        vocabulary: Weights of the output layer, ``(vocab_size, hidden_size)``.
        token_ids: ``(B, S)``.
        weights: Weight of the loss at each token, ``(B, S)``.
    """
    logits = F.linear(hidden[:, :-1], vocabulary).float().flatten(0, 1)
    losses = F.cross_entropy(logits, token_ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train_model(
    model: LlamaForCausalLM,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    config: TrainConfig,
    device: torch.device,
) -> None:
    """Train in place: AdamW with a cosine schedule; on CUDA compiled, in bfloat16 autocast."""
    is_cuda = device.type == "cuda"
    loss_function = weighted_loss
    if is_cuda:
        # Layer by layer, because a model compiled as a whole builds a mask, which SDPA's causal
        # kernel does not take.
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        loss_function = torch.compile(weighted_loss, dynamic=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, (0.9, 0.95), weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate_factor(config))
    model.train()
    started = time.perf_counter()
    for step, batch in enumerate(islice(batches, config.steps)):
        token_ids, weights = (tensor.to(device) for tensor in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_cuda):
            hidden = model.model(input_ids=token_ids, use_cache=False).last_hidden_state
            loss = loss_function(hidden, model.lm_head.weight, token_ids, weights)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == config.steps - 1:
            seconds = time.perf_counter() - started
            _log(f"step {step}: loss {loss.item():.3f}, {seconds:.0f} s")


def _learning_rate_factor(config: TrainConfig) -> Callable[[int], float]:
    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / config.warmup_steps)
        return warmup * 0.5 * (1.0 + float(np.cos(np.pi * step / config.steps)))

    return factor


def run(config: TrainConfig, output: Path, device: torch.device) -> dict[str, float]:
    """Make the world, train tokenizer and model, write everything, evaluate the written model.

    Returns:
        The evaluation table: accuracy by arrangement.
    """
    world = make_world(config.seed, config.world)
    questions = make_questions(world)
    output.mkdir(parents=True, exist_ok=True)
    (output / "questions.jsonl").write_text(format_questions(questions), encoding="utf-8")

    pairs = list(make_training_pairs(world, config.pairs))
    tokenizer = train_tokenizer(
        (question + answer for question, answer in pairs[: config.tokenizer_pairs]),
        config.shape.vocab_size,
        config.shape.max_position_embeddings,
    )
    encoded = encode_pairs(tokenizer, pairs)
    _log(f"{config.pairs} pairs, {len(encoded.token_ids) / config.pairs:.1f} tokens each")

    with _determinism(config.seed):
        model = build_model(config.shape, tokenizer)
        model.to(device)  # type: ignore[arg-type]
        batches = make_batches(encoded, config, tokenizer.bos_token_id, tokenizer.pad_token_id)
        started = time.perf_counter()
        train_model(model, batches, config, device)
        train_seconds = time.perf_counter() - started
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")

    shipped = LlamaForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
    shipped.to(device)  # type: ignore[arg-type]
    table = evaluate(shipped, tokenizer, questions, make_questions(world, Noise()))
    record = {
        "config": asdict(config),
        "parameters": shipped.num_parameters(),
        "train_seconds": round(train_seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "accuracy": table,
    }
    (output / "model" / "training.json").write_text(
        json.dumps(record, indent=2) + "\n", encoding="utf-8"
    )
    return table


@contextmanager
def _determinism(seed: int) -> Iterator[None]:
    """Seed PyTorch and refuse kernels whose result depends on the order of execution."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was_enabled = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train, print the table."""
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(
        prog="python -m demo_model.train", description="Train the demo model."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/demo"), help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="default: %(default)s")
    parser.add_argument(
        "--device",
        type=torch.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    options = parser.parse_args(arguments)
    config = replace(defaults, seed=options.seed, steps=options.steps)
    table = run(config, options.output, options.device)
    for name, share in table.items():
        print(f"{name:36} {share:6.1%}")


if __name__ == "__main__":
    main()
