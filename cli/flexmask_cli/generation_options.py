"""Options that `generate` and `compare` share, and the run that they define."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flexmask_cli.options import (
    BatchOptions,
    ChatOptions,
    EngineOptions,
    ModelOptions,
    ResultOptions,
    RowOptions,
    SamplingOptions,
)
from flexmask_cli.planned_run import PlannedRun

if TYPE_CHECKING:
    from flexmask.tasks.judge import Judge


@dataclass(frozen=True)
class RunOptions:
    """The rows, model, generation, device and results of a run over a data set."""

    rows: RowOptions
    model: ModelOptions
    chat: ChatOptions
    batch: BatchOptions
    sampling: SamplingOptions
    engine: EngineOptions
    results: ResultOptions


@dataclass(frozen=True)
class PlannedGeneration(PlannedRun[RunOptions, "Judge"]):
    """The options of a run that generates, and its task."""

    @property
    def judge(self) -> Judge:
        """The task's judge; without a task, exact match of the first line."""
        from flexmask.tasks.judge import Judge

        return self.task.judge if self.task else Judge()

    def that_change_rows(self) -> dict[str, Any]:
        """Return arguments of `Engine.generate` that change what is in the rows."""
        return {
            "max_new_tokens": self.options.batch.max_new_tokens,
            "sampling": self.options.sampling.sampling,
            "stop": self.options.sampling.stop_strings,
            "chat_template": self.uses_chat_template,
            "allow_special_tokens": self.options.chat.allow_special_tokens,
        }

    def recorded(self) -> dict[str, Any]:
        """Return the record of length, sampling and stop strings."""
        return {
            "max_new_tokens": self.options.batch.max_new_tokens,
            "sampling": asdict(self.options.sampling.sampling),
            "stop": self.options.sampling.stop_strings,
        }
