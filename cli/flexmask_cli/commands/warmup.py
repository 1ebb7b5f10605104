"""``flexmask warmup``: compile what later runs need, before they need it."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from flexmask.limits import check_size
from flexmask_cli import render
from flexmask_cli.engine_loading import load_engine
from flexmask_cli.options import (
    BatchSize,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    Parameters,
    StrategyName,
    TrustRemoteCode,
    parse_batch_size,
)
from flexmask_cli.strategy_choice import choose_strategy

PromptTokens = Annotated[int, typer.Option(help="Tokens of the longest prompt to expect.")]
NumSegments = Annotated[int, typer.Option(help="Segments of a prompt.")]


def warmup(
    strategy: StrategyName = "ensemble_isolation",
    param: Parameters = None,
    model: Model = None,
    prompt_tokens: PromptTokens = 1024,
    num_segments: NumSegments = 5,
    max_new_tokens: MaxNewTokens = 20,
    batch_size: BatchSize = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compile for a model, a strategy and sizes; a later run finds it on disk."""
    chosen = choose_strategy(strategy, param)
    rows = parse_batch_size(batch_size)
    check_size("--prompt-tokens", prompt_tokens, 1)
    check_size("--num-segments", num_segments, 1)
    check_size("--max-new-tokens", max_new_tokens, 1)
    engine = load_engine(model, device, dtype, trust_remote_code, verbose=False)
    for name in ("cold", "warm"):
        started = time.perf_counter()
        stats = engine.warm_up(
            chosen,
            prompt_tokens=prompt_tokens,
            num_segments=num_segments,
            max_new_tokens=max_new_tokens,
            batch_size=rows,
        )
        seconds = time.perf_counter() - started
        render.print_line(
            f"{name}: a batch of {stats.batch_size} rows in {seconds:.1f} s, "
            f"{stats.compilations} graphs compiled or read from disk"
        )
