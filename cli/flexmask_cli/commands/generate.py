"""``flexmask generate``: generates for the rows of a data set, into a result file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmask.errors import OptionError, RequestError
from flexmask.fusion import FUSIONS
from flexmask_cli.cluster_run import check_input, first_generations, generate_on_cluster
from flexmask_cli.dataset_command import STDOUT, DatasetCommand, OutputOptions, Written
from flexmask_cli.dataset_options import OpenInput, RequestOptions
from flexmask_cli.generation_options import PlannedGeneration, RunOptions, TokenOptions
from flexmask_cli.option_groups import takes_options
from flexmask_cli.options import FusionOptions, StrategyOptions
from flexmask_cli.planned_run import PlannedRun
from flexmask_cli.render.generation import (
    SHOWN_ANSWERS,
    print_answers,
    print_kernels,
    print_notes,
    print_rules,
    print_stats,
)
from flexmask_cli.scaling_options import ScalingOptions
from flexmask_cli.strategy_choice import ChosenStrategy, choose_strategy
from flexmask_cli.streams import write_text

if TYPE_CHECKING:
    from flexmask.engine import Engine, RunStats
    from flexmask.generation import Generation
    from flexmask.results.dataset_run import DatasetJob, DatasetRun
    from flexmask.results.result_writer import ResultWriter
    from flexmask.results.row_stream import RowStream
    from flexmask.tasks.request_source import RequestSource


@takes_options
def generate(
    *,
    strategy: StrategyOptions,
    fusion: FusionOptions,
    data: RequestOptions,
    output: OutputOptions,
    run: RunOptions,
    tokens: TokenOptions,
    scaling: ScalingOptions,
) -> None:
    """Generate an answer for each row of a data set, under a mask strategy."""
    choose = partial(choose_strategy, strategy.strategy, strategy.parameters)
    fusion.chosen.check_samples(is_greedy=run.sampling.sampling.is_greedy)
    if tokens.segment_attention:
        fusion.chosen.check_one_prompt()
    chosen = choose()
    open_input = partial(
        data.open,
        fusion=fusion.chosen,
        num_segments=data.num_segments,
        limit=run.rows.limit,
        on_bad_row=run.rows.on_bad_row,
    )
    opened = open_input()
    Generate(
        planned=PlannedGeneration(run, opened.task, tokens),
        chosen=chosen,
        fusion=fusion.chosen,
        opened=opened,
        num_segments=data.num_segments,
        output=output,
        part=scaling,
        scaling=scaling,
        again=Again(choose, open_input, data.input),
    ).run()


@dataclass(frozen=True)
class Again:
    """The steps that other processes repeat: choosing the strategy, and opening the input.

    Attributes:
        choose: Makes the strategy.
        open_input: Opens the input.
        input: The input, as the user named it.
    """

    choose: Callable[[], ChosenStrategy]
    open_input: Callable[[], OpenInput]
    input: str | None


@dataclass(frozen=True)
class Generate(DatasetCommand["Generation"]):
    """A run that generates.

    Attributes:
        scaling: The processes that run it.
        again: What other processes do again.
    """

    scaling: ScalingOptions
    again: Again

    @property
    def result_name(self) -> str:
        """The name of the strategy."""
        return self.chosen.strategy.name

    @property
    def is_elsewhere(self) -> bool:
        """True if a cluster runs it."""
        return self.scaling.is_on_ray

    def run(self) -> None:
        """Run the data set, or print its prompts.

        Raises:
            OptionError: If a cluster shall write to standard output.
        """
        output = self.output
        if self.scaling.is_on_ray and output.output == STDOUT and not output.dry_run:
            raise OptionError("--engine ray writes a file; leave out --output -")
        super().run()

    def write_file(self, path: Path) -> Written[Generation]:
        """Generate in this process or on a cluster, and write a result file."""
        if not self.scaling.is_on_ray:
            return super().write_file(path)
        from flexmask.results.dataset_run import GenerationJob

        check_input(self.again.input)
        job = self.planned.job(
            self.again.choose,
            partial(_requests_of, self.again.open_input, self.planned),
            self.fusion,
            self.opened.name,
        )
        assert isinstance(job, GenerationJob)
        options = self.planned.options
        outcome = generate_on_cluster(
            job,
            path,
            options.results.mode,
            self.scaling,
            options.engine.device,
            ranks=options.engine.num_ranks,
            is_quiet=options.results.quiet,
            is_verbose=self.output.verbose,
        )
        shown = [] if outcome.stats is None else first_generations(path, SHOWN_ANSWERS)
        return Written(outcome.summary, shown, outcome.stats)

    def run_rest(
        self, job: DatasetJob[Generation], writer: ResultWriter | RowStream
    ) -> tuple[Sequence[Generation], RunStats | None]:
        """Generate for the remaining requests; a single one is streamed to a terminal."""
        if self._is_streamed(writer):
            return [], self._stream(job, writer)
        return super().run_rest(job, writer)

    def print_notes(self, engine: Engine, run: DatasetRun[Generation]) -> None:
        """Print strategy, model, attention, batches and rules of generation."""
        self._print_notes(engine, run.engine_run.stats)

    def print_kernels(self, engine: Engine, stats: RunStats) -> None:
        """Print the kernels of prefill and decode, and the shares of the floor."""
        print_kernels(engine, stats)

    def print_made(self, shown: Sequence[Generation], stats: RunStats) -> None:
        """Print answers, counts and times."""
        if shown:
            print_answers(shown, self.planned.judge)
        print_stats(stats, self.fusion)

    def _print_notes(self, engine: Engine, stats: RunStats) -> None:
        print_notes(engine, self.chosen.strategy, f"{self.fusion}, {FUSIONS[self.fusion.name]}")
        print_rules(engine.generation_rules(), stats)

    def _is_streamed(self, writer: ResultWriter | RowStream) -> bool:
        """Return True if the one answer of a run is printed to a terminal as it is generated."""
        if self.planned.for_engine().get("segment_attention"):
            return False
        is_quiet = self.planned.options.results.quiet
        prints_text = not (self.output.as_json or self.output.output == STDOUT or is_quiet)
        is_one = len(writer.remaining) == 1 and self.fusion.is_single
        return is_one and prints_text and _is_terminal()

    def _stream(
        self, job: DatasetJob[Generation], writer: ResultWriter | RowStream
    ) -> RunStats | None:
        """Generate for the one request, print its text meanwhile, and write its row."""
        from flexmask.tasks.request_source import BadRow

        engine, strategy = job.load_engine(), job.make_strategy()
        (request,) = writer.remaining
        options = {name: value for name, value in job.options.items() if name != "batch_size"}
        try:
            stream = engine.stream(request, strategy, fusion=writer.fusion, **options)
            if self.output.verbose:
                self._print_notes(engine, stream.run.stats)
            for piece in stream:
                write_text(piece, end="")
        except RequestError as error:
            if job.on_error == "stop":
                raise
            writer.write([BadRow(request.uuid, str(error), request)])
            return None
        write_text("")
        writer.write([stream.generation])
        if self.output.verbose:
            print_kernels(engine, stream.run.stats)
        return stream.run.stats


def _requests_of(
    open_input: Callable[[], OpenInput], planned: PlannedRun[Any, Any]
) -> RequestSource:
    return planned.checked(open_input().requests)


def _is_terminal() -> bool:
    return sys.stdout.isatty()
