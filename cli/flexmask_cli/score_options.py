"""Options of `score`, and the run that they define."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from flexmask.choice_scores import Normalize, check_normalization
from flexmask.fusion import Fusion, check_score_fusion
from flexmask_cli import completion
from flexmask_cli.option_kinds import text
from flexmask_cli.options import (
    BatchSizeOptions,
    ChatOptions,
    ResultOptions,
    RowOptions,
    RunEngineOptions,
    RunModelOptions,
)
from flexmask_cli.planned_run import DatasetOptions, PlannedRun

if TYPE_CHECKING:
    from flexmask.results.dataset_run import ScoringJob
    from flexmask.tasks.judge import ChoiceJudge


@dataclass(frozen=True)
class NormalizeOptions:
    """The way choices are compared."""

    heading: ClassVar[str] = "Strategy"

    normalize: Annotated[
        str,
        text(
            "--normalize",
            metavar="none|tokens|bytes",
            completion=completion.normalizations,
            help="What the log-probability of a choice is divided by before choices are "
            "compared: nothing, its number of tokens, or its number of bytes.",
        ),
    ] = "none"

    def __post_init__(self) -> None:
        """Check the name.

        Raises:
            OptionError: If it is unknown.
        """
        _ = self.chosen_normalization

    @property
    def chosen_normalization(self) -> Normalize:
        """The normalization."""
        return check_normalization(self.normalize)


@dataclass(frozen=True)
class ScoreOptions(NormalizeOptions):
    """The way choices are compared, and the fusion of the scores of a request's segments."""

    fusion: Annotated[
        str,
        text(
            "--fusion",
            completion=completion.score_fusions,
            help="attention puts all segments into one prompt, under the strategy's mask. Every "
            "other fusion makes each segment a prompt of its own: mean averages the "
            "log-probabilities of a choice over the prompts, mean_prob its probabilities; none "
            "scores after the first prompt only, each after every prompt by itself.",
        ),
    ] = "attention"

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            OptionError: If a name is unknown.
        """
        super().__post_init__()
        _ = self.chosen_fusion

    @property
    def chosen_fusion(self) -> Fusion:
        """The fusion."""
        fusion = Fusion(self.fusion)
        check_score_fusion(fusion)
        return fusion


@dataclass(frozen=True)
class ScoreRunOptions:
    """The rows, model, device and results of a run that scores choices."""

    rows: RowOptions
    model: RunModelOptions
    chat: ChatOptions
    batch: BatchSizeOptions
    engine: RunEngineOptions
    results: ResultOptions


@dataclass(frozen=True)
class PlannedScoring(PlannedRun[DatasetOptions, "ChoiceJudge"]):
    """The options of a run that scores choices, and its task.

    Attributes:
        normalize: What log-probabilities are divided by before they are compared.
    """

    normalize: Normalize

    @property
    def judge(self) -> ChoiceJudge:
        """Picks the choice with the highest score."""
        from flexmask.tasks.judge import ChoiceJudge

        return ChoiceJudge(self.normalize)

    @property
    def job_type(self) -> type[ScoringJob]:
        """A run that scores choices."""
        from flexmask.results.dataset_run import ScoringJob

        return ScoringJob

    def that_change_rows(self) -> dict[str, Any]:
        """Return arguments of `Engine.score` that change what is in the rows."""
        return {
            "chat_template": self.uses_chat_template,
            "allow_special_tokens": self.options.chat.allow_special_tokens,
        }

    def recorded(self) -> dict[str, Any]:
        """Return the record of the template of choices."""
        return {"scores": "choices", "choice": self.task.choice if self.task else None}
