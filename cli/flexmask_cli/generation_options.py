"""Options that `generate` and `compare` share, and the run that they define."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from flexmask_cli.option_groups import changed_options
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

    @property
    def changed_for_generation(self) -> list[str]:
        """The names of the given options that change what is generated, and nothing else."""
        groups = (self.batch, self.sampling, self.judging)
        changed = [name for group in groups for name in changed_options(group)]
        return [name for name in changed if name != "--batch-size"]


@dataclass(frozen=True)
class LogprobOptions:
    """Log-probabilities of generated tokens that are kept beside their text."""

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

    @property
    def chosen(self) -> dict[str, Any]:
        """The arguments of `Engine.generate` that ask for something."""
        asked_for = {
            "logprobs": self.logprobs or self.top_logprobs > 0,
            "top_logprobs": self.top_logprobs,
        }
        return {name: value for name, value in asked_for.items() if value}


@dataclass(frozen=True)
class TokenOptions(LogprobOptions):
    """Measures of generated tokens that are kept beside their text."""

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
        return super().chosen | ({"segment_attention": True} if self.segment_attention else {})


@dataclass(frozen=True)
class PlannedGeneration(PlannedRun[RunOptions, "Judge"]):
    """The options of a run that generates, and its task.

    Attributes:
        asked_for: The measures of generated tokens that are kept beside their text.
    """

    asked_for: LogprobOptions = LogprobOptions()

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
        return self.asked_for.chosen | {
            "max_new_tokens": self.options.batch.max_new_tokens,
            "sampling": self.options.sampling.sampling,
            "stop": self.options.sampling.stop_strings,
            "chat_template": self.uses_chat_template,
            "allow_special_tokens": self.options.chat.allow_special_tokens,
        }

    def recorded(self) -> dict[str, Any]:
        """Return the record of length, sampling and stop strings."""
        return self.asked_for.chosen | {
            "max_new_tokens": self.options.batch.max_new_tokens,
            "sampling": asdict(self.options.sampling.sampling),
            "stop": self.options.sampling.stop_strings,
        }
