"""``flexmask warmup``: compiles in advance what later runs need."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, ClassVar

from flexmask_cli.engine_loading import load_engine
from flexmask_cli.option_groups import takes_options
from flexmask_cli.option_kinds import size
from flexmask_cli.options import BatchOptions, EngineOptions, RunModelOptions, StrategyOptions
from flexmask_cli.render.lines import print_line
from flexmask_cli.strategy_choice import choose_strategy


@dataclass(frozen=True)
class PromptOptions:
    """The sizes of the prompts to expect."""

    heading: ClassVar[str] = "Prompts"

    prompt_tokens: Annotated[
        int, size("--prompt-tokens", help="Tokens of the longest prompt to expect.")
    ] = 1024
    num_segments: Annotated[int, size("--num-segments", help="Segments of a prompt.")] = 5


@takes_options
def warmup(
    *,
    strategy: StrategyOptions,
    prompts: PromptOptions,
    model: RunModelOptions,
    batch: BatchOptions,
    options: EngineOptions,
) -> None:
    """Compile for a model, a strategy and sizes, so that later runs start without compiling.

    Compiled graphs and kernels are kept on disk, in the caches of torch and Triton.
    """
    chosen = choose_strategy(strategy.strategy, strategy.parameters)
    engine = load_engine(model, options)
    for name in ("cold", "warm"):
        started = time.perf_counter()
        stats = engine.warm_up(
            chosen.strategy,
            prompt_tokens=prompts.prompt_tokens,
            num_segments=prompts.num_segments,
            max_new_tokens=batch.max_new_tokens,
            batch_size=batch.rows_at_once,
        )
        seconds = time.perf_counter() - started
        print_line(
            f"{name}: a batch of {stats.batch_size} rows in {seconds:.1f} s, "
            f"{stats.compilations} graphs compiled or read from disk"
        )
