"""Other ways to run rows of a data set, as peers for ``dataset_run.py``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from flexmask import Engine, Layout, Request, RequestTokenizer, Strategy
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import strategy_mask


@torch.no_grad()
def rerun_rows_per_s(
    engine: Engine, strategy: Strategy, requests: Sequence[Request], max_new_tokens: int
) -> float:
    """Run one row at a time, rebuilding its mask and recomputing the sequence for every token.

    This is the cost of a patched attention without a key-value cache.
    """
    engine.model.set_attn_implementation("sdpa")
    tokenizer = RequestTokenizer(engine.tokenizer)
    rerun(engine, strategy, strategy.layout(tokenizer(requests[0])), max_new_tokens)
    started = time.perf_counter()
    for request in requests:
        rerun(engine, strategy, strategy.layout(tokenizer(request)), max_new_tokens)
    return len(requests) / (time.perf_counter() - started)


def rerun(engine: Engine, strategy: Strategy, layout: Layout, max_new_tokens: int) -> list[int]:
    """Generate for one layout under a dense mask, without a cache; return the new tokens."""
    device, dtype = engine.model.device, engine.model.dtype
    tokens = list(layout.token_ids)
    for count in range(max_new_tokens):
        batch = LayoutBatch(1, len(tokens), device)
        batch.load([layout.extended(count)], [len(tokens)], [0])
        row, slots = torch.zeros((), dtype=torch.long), torch.arange(len(tokens))
        row, slots = row.to(device), slots.to(device)
        seen = strategy_mask(strategy, batch)(row, row, slots[:, None], slots)
        output = engine.model(
            input_ids=torch.tensor([tokens], device=device),
            attention_mask=torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[None, None],
            position_ids=batch.position_ids.long(),
            use_cache=False,
        )
        tokens.append(int(output.logits[0, -1].argmax()))
    return tokens[len(layout) :]


@torch.no_grad()
def separate_rows_per_s(
    engine: Engine, requests: Sequence[Request], max_new_tokens: int, batch_size: int
) -> float:
    """Run transformers' generate on every paraphrase separately, in batches of similar length."""
    tokenizer = engine.tokenizer
    model: Any = engine.model  # to mypy its generate is a submodule or a tensor
    model.set_attn_implementation("sdpa")
    texts = [r.prefix + segment + r.suffix for r in requests for segment in r.segments]
    batches = [
        tokenizer(
            texts[start : start + batch_size],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        for texts in [sorted(texts, key=len)]
        for start in range(0, len(texts), batch_size)
    ]

    def run() -> float:
        started = time.perf_counter()
        for batch in batches:
            tokens = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens,
                do_sample=False,
            )
            tokens.tolist()
        return time.perf_counter() - started

    run()
    return len(requests) / run()
