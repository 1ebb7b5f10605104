"""Options that `generate` and `compare` share, and the run that they define."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from flexmask_cli.option_kinds import flag, size
from flexmask_cli.options import (
    BatchOptions,
    ChatOptions,
    JudgeOptions,
    ResultOptions,
    RowOptions,
    RunEngineOptions,
    RunModelOptions,
    SamplingOptions,
)
from flexmask_cli.planned_run import PlannedRun

if TYPE_CHECKING:
    from flexmask.results.dataset_run import GenerationJob
    from flexmask.tasks.judge import Judge


@dataclass(frozen=True)
class RunOptions:
    """The rows, model, generation, device and results of a run over a data set."""

    rows: RowOptions
    model: RunModelOptions
    chat: ChatOptions
    batch: BatchOptions
    sampling: SamplingOptions
    judging: JudgeOptions
    engine: RunEngineOptions
    results: ResultOptions


@dataclass(frozen=True)
class TokenOptions:
    """Measures of generated tokens that are kept beside their text."""

    heading: ClassVar[str] = "Generation"

    logprobs: Annotated[
        bool,
        flag(
            "--logprobs",
            help="Also write the tokens and their log-probabilities (docs/scores.md).",
        ),
    ] = False
    top_logprobs: Annotated[
        int,
        size(
            "--top-logprobs",
            least=0,
            help="Also write the N most likely tokens in the place of each, and --logprobs.",
        ),
    ] = 0
    segment_attention: Annotated[
        bool,
        flag(
            "--segment-attention",
            help="Also write which parts of the prompt each generated token attends to. Prompts "
            "are computed twice for it.",
        ),
    ] = False

    @property
    def chosen(self) -> dict[str, Any]:
        """The arguments of `Engine.generate` that ask for something."""
        asked_for = {
            "logprobs": self.logprobs or self.top_logprobs > 0,
            "top_logprobs": self.top_logprobs,
            "segment_attention": self.segment_attention,
        }
        return {name: value for name, value in asked_for.items() if value}


@dataclass(frozen=True)
class PlannedGeneration(PlannedRun[RunOptions, "Judge"]):
    """The options of a run that generates, and its task.

    Attributes:
        asked_for: What is kept of generated tokens beside their text; None for nothing.
    """

    asked_for: TokenOptions | None = None

    @property
    def judge(self) -> Judge:
        """The judge of the answers."""
        return self.options.judging.of(self.task)

    @property
    def job_type(self) -> type[GenerationJob]:
        """A run that generates."""
        from flexmask.results.dataset_run import GenerationJob

        return GenerationJob

    def that_change_rows(self) -> dict[str, Any]:
        """Return arguments of `Engine.generate` that change what is in the rows."""
        return self._measured() | {
            "max_new_tokens": self.options.batch.max_new_tokens,
            "sampling": self.options.sampling.sampling,
            "stop": self.options.sampling.stop_strings,
            "chat_template": self.uses_chat_template,
            "allow_special_tokens": self.options.chat.allow_special_tokens,
        }

    def recorded(self) -> dict[str, Any]:
        """Return the record of length, sampling and stop strings."""
        return self._measured() | {
            "max_new_tokens": self.options.batch.max_new_tokens,
            "sampling": asdict(self.options.sampling.sampling),
            "stop": self.options.sampling.stop_strings,
        }

    def _measured(self) -> dict[str, Any]:
        return {} if self.asked_for is None else self.asked_for.chosen
