"""``flexmask generate``: generates for the rows of a data set, into a result file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmask.fusion import FUSIONS
from flexmask_cli.dataset_command import DatasetCommand, OutputOptions
from flexmask_cli.dataset_options import RequestOptions
from flexmask_cli.generation_options import PlannedGeneration, RunOptions
from flexmask_cli.option_groups import takes_options
from flexmask_cli.options import FusionOptions, StrategyOptions
from flexmask_cli.render.generation import (
    print_answers,
    print_kernels,
    print_notes,
    print_rules,
    print_stats,
)
from flexmask_cli.strategy_choice import choose_strategy

if TYPE_CHECKING:
    from flexmask.engine import Engine, RunStats
    from flexmask.generation import Generation
    from flexmask.results.dataset_run import DatasetRun
    from flexmask.results.result_writer import ResultWriter
    from flexmask.results.row_stream import RowStream


@takes_options
def generate(
    *,
    strategy: StrategyOptions,
    fusion: FusionOptions,
    data: RequestOptions,
    output: OutputOptions,
    run: RunOptions,
) -> None:
    """Generate an answer for each row of a data set, under a mask strategy."""
    chosen = choose_strategy(strategy.strategy, strategy.parameters)
    opened = data.open(
        fusion=fusion.chosen,
        num_segments=data.num_segments,
        limit=run.rows.limit,
        on_bad_row=run.rows.on_bad_row,
    )
    planned = PlannedGeneration(run, opened.task)
    Generate(planned, chosen, fusion.chosen, opened, data.num_segments, output).run()


@dataclass(frozen=True)
class Generate(DatasetCommand["Generation"]):
    """A run that generates."""

    @property
    def result_name(self) -> str:
        """The name of the strategy."""
        return self.chosen.strategy.name

    def start(self, engine: Engine, writer: ResultWriter | RowStream) -> DatasetRun[Generation]:
        """Plan to generate for the remaining rows."""
        from flexmask.results.dataset_run import DatasetRun

        return DatasetRun.generating(
            engine,
            self.chosen.strategy,
            writer,
            on_error=self.planned.options.rows.on_bad_row,
            **self.planned.for_engine(),
        )

    def print_notes(self, engine: Engine, run: DatasetRun[Generation]) -> None:
        """Print strategy, model, attention, batches and rules of generation."""
        print_notes(engine, self.chosen.strategy, f"{self.fusion}, {FUSIONS[self.fusion.name]}")
        print_rules(engine.generation_rules(), run.engine_run.stats)

    def print_kernels(self, engine: Engine) -> None:
        """Print the kernels of prefill and decode."""
        print_kernels(engine)

    def print_made(self, shown: Sequence[Generation], stats: RunStats) -> None:
        """Print answers, counts and times."""
        print_answers(shown, self.planned.judge)
        print_stats(stats, self.fusion)
