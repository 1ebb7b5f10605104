"""``flexmask generate``: generates for the rows of a data set, into a result file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from flexmask.errors import RequestError
from flexmask.fusion import FUSIONS
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask_cli.dataset_command import STDOUT, DatasetCommand, OutputOptions, RunSource
from flexmask_cli.dataset_options import RequestOptions
from flexmask_cli.generation_options import PlannedGeneration, RunOptions, TokenOptions
from flexmask_cli.option_groups import takes_options
from flexmask_cli.options import FusionOptions, StrategyOptions
from flexmask_cli.render.generation import (
    print_answers,
    print_kernels,
    print_notes,
    print_rules,
    print_stats,
)
from flexmask_cli.scaling_options import ScalingOptions
from flexmask_cli.strategy_choice import choose_strategy
from flexmask_cli.streams import write_text

if TYPE_CHECKING:
    from flexmask.engine import Engine, RunStats
    from flexmask.results.dataset_run import DatasetJob, DatasetRun
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
    tokens: TokenOptions,
    scaling: ScalingOptions,
) -> None:
    """Generate an answer for each row of a data set, under a mask strategy."""
    choose = partial(choose_strategy, strategy.strategy, strategy.parameters)
    fusion.chosen.check_samples(is_greedy=run.sampling.sampling.is_greedy)
    if tokens.segment_attention:
        fusion.chosen.check_one_prompt()
    open_input = partial(
        data.open,
        fusion=fusion.chosen,
        num_segments=data.num_segments,
        limit=run.rows.limit,
        on_bad_row=run.rows.on_bad_row,
    )
    source = RunSource.open(choose, open_input, data.input)
    planned = PlannedGeneration(run, source.opened.task, tokens)
    Generate(planned, source, fusion.chosen, data.num_segments, output, scaling).run()


@dataclass(frozen=True)
class Generate(DatasetCommand[Generation]):
    """A run that generates."""

    @property
    def result_name(self) -> str:
        """The name of the strategy."""
        return self.source.chosen.strategy.name

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

    def made_of(self, request: Request, row: Mapping[str, Any]) -> Generation:
        """Return the generation of a row, without its tokens."""
        return Generation(
            request=request,
            text=row["generation"],
            token_ids=(),
            finish_reason=row["finish_reason"],
            prompt_tokens=row["prompt_tokens"],
        )

    def _print_notes(self, engine: Engine, stats: RunStats) -> None:
        print_notes(
            engine, self.source.chosen.strategy, f"{self.fusion}, {FUSIONS[self.fusion.name]}"
        )
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


def _is_terminal() -> bool:
    return sys.stdout.isatty()
