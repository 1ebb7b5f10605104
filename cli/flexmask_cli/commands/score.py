"""``flexmask score``: how likely each choice of the rows of a data set is, into a result file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.fusion import SCORE_FUSIONS
from flexmask_cli.dataset_command import DatasetCommand, OutputOptions
from flexmask_cli.dataset_options import RequestOptions
from flexmask_cli.option_groups import takes_options
from flexmask_cli.options import StrategyOptions
from flexmask_cli.render.generation import print_floor, print_notes
from flexmask_cli.render.scores import print_prefill_kernel, print_score_stats, print_scores
from flexmask_cli.scaling_options import ShardOptions
from flexmask_cli.score_options import PlannedScoring, ScoreOptions, ScoreRunOptions
from flexmask_cli.strategy_choice import choose_strategy

if TYPE_CHECKING:
    from flexmask.choice_scores import Score
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
    scaling: ShardOptions,
) -> None:
    """Score the choices of each row of a data set, and choose the most likely."""
    chosen, fusion = choose_strategy(strategy.strategy, strategy.parameters), score.chosen_fusion
    opened = data.open(
        fusion=fusion,
        num_segments=data.num_segments,
        limit=run.rows.limit,
        on_bad_row=run.rows.on_bad_row,
        reads_choices=True,
    )
    planned = PlannedScoring(run, opened.task, score.chosen_normalization)
    ScoreChoices(planned, chosen, fusion, opened, data.num_segments, output, scaling).run()


@dataclass(frozen=True)
class ScoreChoices(DatasetCommand["Score"]):
    """A run that scores choices."""

    @property
    def result_name(self) -> str:
        """The name of the strategy, told from a file of generations."""
        return f"{self.chosen.strategy.name}-scores"

    def print_notes(self, engine: Engine, run: DatasetRun[Score]) -> None:
        """Print strategy, model and attention."""
        fusion = f"{self.fusion}, {SCORE_FUSIONS[self.fusion.name]}"
        print_notes(engine, self.chosen.strategy, fusion)

    def print_kernels(self, engine: Engine, stats: RunStats) -> None:
        """Print the kernel of prefill, and its share of the floor."""
        print_prefill_kernel(engine)
        print_floor(engine, stats)

    def print_made(self, shown: Sequence[Score], stats: RunStats) -> None:
        """Print choices, counts and times."""
        print_scores(shown, self.planned.judge)
        print_score_stats(stats, self.fusion)
