"""Warming up: one batch of made-up tokens, with which all that runs of its size need compiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.executor import Executor
from flexmask.engine.model_runner import ModelRunner, bucketed_capacity
from flexmask.engine.prompt_group import PromptGroup
from flexmask.engine.prompt_planner import beyond_context
from flexmask.engine.run_options import RunOptions
from flexmask.engine.run_stats import RunStats
from flexmask.engine.scheduler import Scheduler
from flexmask.errors import ModelError, OptionError
from flexmask.layout import Layout, TokenizedRequest
from flexmask.limits import check_size
from flexmask.strategy import Strategy


@dataclass(frozen=True)
class WarmUp:
    """The size of the runs that are compiled for.

    Attributes:
        prompt_tokens: Tokens of the longest prompt.
        num_segments: Segments of each prompt.
        max_new_tokens: Most tokens per generation.
        batch_size: Prompts that run together; None chooses by memory.

    Raises:
        OptionError: If the segments do not fit into the prompt, or a size is impossible.
    """

    prompt_tokens: int
    num_segments: int
    max_new_tokens: int
    batch_size: int | None

    def __post_init__(self) -> None:
        check_size("prompt_tokens", self.prompt_tokens, 1)
        check_size("max_new_tokens", self.max_new_tokens, 1)
        if self.batch_size is not None:
            check_size("batch_size", self.batch_size, 1)
        if self.num_segments < 1 or self._segment_tokens < 2:
            raise OptionError(
                f"{self.num_segments} segments do not fit into a prompt of {self.prompt_tokens} "
                "tokens"
            )

    @property
    def _segment_tokens(self) -> int:
        return (self.prompt_tokens - 1) // max(1, self.num_segments)

    def run(
        self,
        executor: Executor,
        strategy: Strategy,
        tokenizer: RequestTokenizer,
        options: RunOptions,
    ) -> RunStats:
        """Run one batch.

        Args:
            executor: Executes it.
            strategy: The mask strategy.
            tokenizer: Decodes the tokens.
            options: The options of the run.

        Returns:
            Counts and times of the batch.

        Raises:
            OptionError: If the prompt does not fit into the model's context.
            ModelError: If there is too little memory for one row, or logits are NaN or infinite.
        """
        runner = executor.runner
        layout = self._layout(strategy, runner)
        capacity = bucketed_capacity(len(layout) + self.max_new_tokens)
        rows = self.batch_size or executor.auto_batch_size(executor.largest_batch, capacity)
        prompts = [
            PromptGroup(number, (layout,), ("",), (1.0,))
            for number in range(max(1, runner.rows_that_fit(rows, capacity)))
        ]
        scheduler = Scheduler(executor, strategy, tokenizer, options, iter([prompts]), rows)
        generated_tokens = 0
        for row in (row for finished in scheduler.run() for one in finished for row in one.rows):
            if row.fault:
                raise ModelError(f"cannot warm up, {row.fault}")
            generated_tokens += len(row.token_ids)
        return replace(
            scheduler.stats,
            generations=len(prompts),
            prompt_tokens=len(prompts) * len(layout),
            generated_tokens=generated_tokens,
        )

    def _layout(self, strategy: Strategy, runner: ModelRunner) -> Layout:
        """Lay out a prompt of made-up tokens."""
        capacity = bucketed_capacity(self.prompt_tokens + self.max_new_tokens)
        if not runner.rows_that_fit(1, capacity):
            raise ModelError(
                f"not enough memory for one row of {capacity} slots; lower prompt_tokens"
            )
        # Another token in each segment: of equal ones only the first would be computed.
        segments = tuple((number,) * self._segment_tokens for number in range(self.num_segments))
        layout = strategy.layout(TokenizedRequest((), segments, (0,)))
        if excess := beyond_context(layout, self.max_new_tokens, runner.context):
            raise OptionError(f"a prompt of {self.prompt_tokens} tokens {excess}")
        return layout
