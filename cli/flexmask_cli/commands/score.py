"""``flexmask score``: how likely each choice of the rows of a data set is, into a result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from flexmask.choice_scores import ChoiceScore, Score
from flexmask.fusion import SCORE_FUSIONS
from flexmask.request import Request
from flexmask_cli.dataset_command import DatasetCommand, OutputOptions, RunSource
from flexmask_cli.dataset_options import RequestOptions
from flexmask_cli.option_groups import takes_options
from flexmask_cli.options import StrategyOptions
from flexmask_cli.render.generation import print_floor, print_notes
from flexmask_cli.render.scores import print_prefill_kernel, print_score_stats, print_scores
from flexmask_cli.scaling_options import ScalingOptions
from flexmask_cli.score_options import PlannedScoring, ScoreOptions, ScoreRunOptions
from flexmask_cli.strategy_choice import choose_strategy

if TYPE_CHECKING:
    from flexmask.engine import Engine, RunStats
    from flexmask.results.dataset_run import DatasetRun


@takes_options
def score(
    *,
    strategy: StrategyOptions,
    score: ScoreOptions,
    data: RequestOptions,
    output: OutputOptions,
    run: ScoreRunOptions,
    scaling: ScalingOptions,
) -> None:
    """Score the choices of each row of a data set, and choose the most likely."""
    choose = partial(choose_strategy, strategy.strategy, strategy.parameters)
    open_input = partial(
        data.open,
        fusion=score.chosen_fusion,
        num_segments=data.num_segments,
        limit=run.rows.limit,
        on_bad_row=run.rows.on_bad_row,
        reads_choices=True,
    )
    source = RunSource.open(choose, open_input, data.input)
    planned = PlannedScoring(run, source.opened.task, score.chosen_normalization)
    fusion, segments = score.chosen_fusion, data.num_segments
    ScoreChoices(planned, source, fusion, segments, output, scaling).run()


@dataclass(frozen=True)
class ScoreChoices(DatasetCommand[Score]):
    """A run that scores choices."""

    @property
    def result_name(self) -> str:
        """The name of the strategy, told from a file of generations."""
        return f"{self.source.chosen.strategy.name}-scores"

    def print_notes(self, engine: Engine, run: DatasetRun[Score]) -> None:
        """Print strategy, model and attention."""
        fusion = f"{self.fusion}, {SCORE_FUSIONS[self.fusion.name]}"
        print_notes(engine, self.source.chosen.strategy, fusion)

    def print_kernels(self, engine: Engine, stats: RunStats) -> None:
        """Print the kernel of prefill, and its share of the floor."""
        print_prefill_kernel(engine)
        print_floor(engine, stats)

    def print_made(self, shown: Sequence[Score], stats: RunStats) -> None:
        """Print choices, counts and times."""
        print_scores(shown, self.planned.judge)
        print_score_stats(stats, self.fusion)

    def made_of(self, request: Request, row: Mapping[str, Any]) -> Score:
        """Return the scores of a row, without the tokens of the choices."""
        columns = (row[name] for name in ("choices", "token_logprobs", "is_greedy"))
        choices = (
            ChoiceScore(text, (), tuple(logprobs), is_greedy)
            for text, logprobs, is_greedy in zip(*columns, strict=True)
        )
        return Score(request, tuple(choices), row["prompt_tokens"])
