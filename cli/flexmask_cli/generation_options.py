"""Options that `generate` and `compare` share, and the run that they define."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flexmask_cli.options import (
    BatchOptions,
    CachedEngineOptions,
    ChatOptions,
    JudgeOptions,
    ResultOptions,
    RowOptions,
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
    engine: CachedEngineOptions
    results: ResultOptions


@dataclass(frozen=True)
class PlannedGeneration(PlannedRun[RunOptions, "Judge"]):
    """The options of a run that generates, and its task.

    Attributes:
        segment_attention: Whether it measures what generated tokens attend to.
    """

    segment_attention: bool = False

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
        return {"segment_attention": True} if self.segment_attention else {}
