"""A command that runs a data set into a result file or to stdout: `generate`, `score`."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Self, TypeVar

from flexmask.errors import OptionError, RequestError
from flexmask.fusion import Fusion
from flexmask.request import Request
from flexmask_cli.cluster_run import check_input, first_rows, request_of, run_on_cluster
from flexmask_cli.dataset_options import OpenInput
from flexmask_cli.interrupt import Interrupt
from flexmask_cli.option_kinds import flag, path
from flexmask_cli.options import BadRows, Verbose
from flexmask_cli.planned_run import PlannedRun
from flexmask_cli.progress import track
from flexmask_cli.render.generation import (
    SHOWN_ANSWERS,
    outcome_figures,
    print_outcome,
    print_prompt,
)
from flexmask_cli.render.lines import (
    print_json,
    print_json_line,
    print_warnings,
    warnings_as_lines,
)
from flexmask_cli.scaling_options import ScalingOptions
from flexmask_cli.strategy_choice import ChosenStrategy
from flexmask_cli.streams import run_goes_on

if TYPE_CHECKING:
    from flexmask.choice_scores import Score
    from flexmask.engine import Engine, RunStats
    from flexmask.generation import Generation
    from flexmask.results.dataset_run import DatasetJob, DatasetRun
    from flexmask.results.result_writer import ResultSummary, ResultWriter
    from flexmask.results.row_stream import RowStream
    from flexmask.tasks.request_source import RequestSource

STDOUT = Path("-")
"""Value of ``--output`` for standard output."""

Made = TypeVar("Made", "Generation", "Score")


@dataclass(frozen=True)
class OutputOptions:
    """The output of a run, and what is printed."""

    heading: ClassVar[str] = "Output"

    output: Annotated[
        Path | None,
        path(
            "--output",
            "-o",
            help="A .feather, .parquet or .jsonl file; - writes JSON Lines to standard output. "
            "Default: outputs/<input>/<model>/<strategy>-<segments>.feather; with a fusion, "
            "<strategy>-<fusion>-<segments>.feather; of scores, <strategy>-scores-….",
        ),
    ] = None
    dry_run: Annotated[bool, flag("--dry-run", help="Print the prompts and generate nothing.")] = (
        False
    )
    verbose: Verbose = False
    as_json: Annotated[
        bool, flag("--json", help="Print counts, accuracy and figures of the run as JSON.")
    ] = False

    def __post_init__(self) -> None:
        """Refuse options that exclude each other.

        Raises:
            OptionError: If two of them print to standard output.
        """
        if self.as_json and self.output == STDOUT:
            raise OptionError("--json and --output - both print to standard output; leave out one")
        if self.as_json and self.dry_run:
            raise OptionError("--dry-run prints prompts; leave out --json")


@dataclass(frozen=True)
class Written(Generic[Made]):
    """The outcome of a run that wrote a result file.

    Attributes:
        summary: Counts over the rows of the file.
        shown: The first results, to be shown.
        stats: Statistics of the run; None if no row remained.
    """

    summary: ResultSummary
    shown: Sequence[Made]
    stats: RunStats | None


@dataclass(frozen=True)
class RunSource:
    """The strategy and the input of a run; other processes choose and open them again.

    Attributes:
        choose: Makes the strategy.
        open_input: Opens the input.
        input: The input, as the user named it.
        chosen: The strategy.
        opened: The input, open.
    """

    choose: Callable[[], ChosenStrategy]
    open_input: Callable[[], OpenInput]
    input: str | None
    chosen: ChosenStrategy
    opened: OpenInput

    @classmethod
    def open(
        cls,
        choose: Callable[[], ChosenStrategy],
        open_input: Callable[[], OpenInput],
        input: str | None,
    ) -> Self:
        """Choose the strategy and open the input."""
        return cls(choose, open_input, input, choose(), open_input())


@dataclass(frozen=True)
class DatasetCommand(ABC, Generic[Made]):
    """A run over a data set, from the options of its command to what it prints.

    Attributes:
        planned: The options of the run, and its task.
        source: The mask strategy and the input.
        fusion: The fusion.
        num_segments: Segments kept of each request; None for all.
        output: Where the rows go, and what is printed.
        scaling: The part of the input that is run, and the processes that run it.
    """

    planned: PlannedRun[Any, Any]
    source: RunSource
    fusion: Fusion
    num_segments: int | None
    output: OutputOptions
    scaling: ScalingOptions

    @property
    @abstractmethod
    def result_name(self) -> str:
        """The beginning of the result file's name, if the user names none."""

    @abstractmethod
    def print_notes(self, engine: Engine, run: DatasetRun[Made]) -> None:
        """Print strategy, model, attention and batches of a run to stderr."""

    @abstractmethod
    def print_kernels(self, engine: Engine, stats: RunStats) -> None:
        """Print the attention kernels that ran, and the shares of the floor, to stderr."""

    @abstractmethod
    def print_made(self, shown: Sequence[Made], stats: RunStats) -> None:
        """Print the first results and the figures of a run."""

    @abstractmethod
    def made_of(self, request: Request, row: Mapping[str, Any]) -> Made:
        """Return the result that a row of a result file holds, as far as it is printed."""

    def run(self) -> None:
        """Run the data set, or print its prompts.

        Raises:
            OptionError: If a cluster shall write to standard output.
        """
        planned, output = self.planned, self.output
        if output.dry_run:
            self._print_prompts()
            return
        if output.output == STDOUT:
            if self.scaling.is_on_ray:
                raise OptionError("--engine ray writes a file; leave out --output -")
            planned.check()
            with warnings_as_lines():
                self._write_stream()
            return

        from flexmask.results.output_path import check_output_name, default_output_path

        path = output.output or default_output_path(
            self.source.opened.stem,
            planned.model_name,
            self.result_name,
            self.num_segments,
            str(self.fusion),
            self.scaling.chosen_shard,
            **planned.options.model.changes,
        )
        check_output_name(path)
        planned.check(is_elsewhere=self.scaling.is_on_ray)
        with run_goes_on(), warnings_as_lines():
            written = self.write_file(path)
        # Printed when the file is in place, since stdout may be a pipe whose reader has exited.
        if output.as_json:
            print_json(outcome_figures(path, written.summary, planned.judge, written.stats))
        elif not planned.options.results.quiet:
            if written.stats is not None:
                self.print_made(written.shown, written.stats)
            print_outcome(path, written.summary, planned.judge)

    def write_file(self, path: Path) -> Written[Made]:
        """Run the remaining requests here or on a cluster, and write their rows into a file."""
        if self.scaling.is_on_ray:
            return self._write_on_cluster(path)
        requests = self._requests()
        job = self._job(requests)
        mode = self.planned.options.results.mode
        with job.open_writer(path, requests, mode, requests.shard) as writer:
            shown, stats = self.run_rest(job, writer)
        return Written(writer.summary, shown, stats)

    def _write_on_cluster(self, path: Path) -> Written[Made]:
        check_input(self.source.input)
        options = self.planned.options
        job = self.planned.job(
            self.source.choose,
            partial(_requests_of, self.source.open_input, self.planned),
            self.fusion,
            self.source.opened.name,
        )
        outcome = run_on_cluster(
            job,
            path,
            options.results.mode,
            self.scaling,
            options.engine.device,
            ranks=options.engine.num_ranks,
            is_quiet=options.results.quiet,
            is_verbose=self.output.verbose,
        )
        rows = [] if outcome.stats is None else first_rows(path, SHOWN_ANSWERS)
        shown = [self.made_of(request_of(row), row) for row in rows]
        return Written(outcome.summary, shown, outcome.stats)

    def run_rest(
        self, job: DatasetJob[Made], writer: ResultWriter | RowStream
    ) -> tuple[Sequence[Made], RunStats | None]:
        """Run the remaining requests; load the model only if there are some.

        Returns:
            The first results, to be shown, and the statistics of the run; None without a run.
        """
        if not writer.remaining:
            return [], None
        engine = job.load_engine()
        run = job.run(engine, job.make_strategy(), writer)
        if self.output.verbose:
            self.print_notes(engine, run)
        try:
            shown = self._run(run, writer)
        except KeyboardInterrupt:
            rows = writer.summary.rows
            to_stdout = self.output.output == STDOUT
            done = "were printed" if to_stdout else "are kept, --resume does the rest"
            print_warnings([f"interrupted; {rows} rows {done}"])
            raise
        if self.output.verbose:
            self.print_kernels(engine, run.engine_run.stats)
        return shown, run.engine_run.stats

    def _requests(self) -> RequestSource:
        return self.scaling.rows_of(self.planned.checked(self.source.opened.requests))

    def _job(self, requests: RequestSource) -> DatasetJob[Made]:
        source = self.source
        return self.planned.job(
            lambda: source.chosen, lambda: requests, self.fusion, source.opened.name
        )

    def _write_stream(self) -> None:
        """Run all requests, and write their rows to stdout as JSON Lines."""
        from flexmask.results.row_stream import RowStream

        if self.planned.options.results.mode != "new":
            raise OptionError("standard output holds no rows; leave out --resume and --overwrite")
        requests, judge = self._requests(), self.planned.judge
        job = self._job(requests)
        stream = RowStream(
            print_json_line,
            requests=requests,
            fusion=self.fusion,
            judge=judge,
            asked_for=job.asked_for,
        )
        self.run_rest(job, stream)

    def _run(self, run: DatasetRun[Made], writer: ResultWriter | RowStream) -> Sequence[Made]:
        """Run; return the first results."""
        first: list[Made] = []
        interrupt = Interrupt()
        is_quiet = self.planned.options.results.quiet
        with interrupt:
            for batch in track(run, len(writer.remaining), interrupt, is_quiet=is_quiet):
                first += batch[: SHOWN_ANSWERS - len(first)]
        if interrupt.is_requested and not writer.is_complete:
            raise KeyboardInterrupt
        return first

    def _print_prompts(self) -> None:
        from flexmask.tasks.request_source import BadRow

        run, fusion = self.planned, replace(self.fusion, samples=1)
        skips = run.options.rows.on_error is BadRows.SKIP
        tokenize = run.load_tokenizer() if run.uses_chat_template else None
        for request in self._requests():
            if isinstance(request, BadRow):
                print_prompt(request)
                continue
            weights = request.weights if fusion.weights == "column" else itertools.repeat(None)
            prompts = itertools.chain(*(prompts for _, prompts in fusion.prompts(request)))
            for prompt, weight in zip(prompts, weights, strict=False):
                try:
                    written = tokenize.in_chat(prompt) if tokenize else prompt
                except RequestError as error:
                    reason = f"{prompt.label}: {error}"
                    if not skips:
                        raise RequestError(reason) from error
                    print_prompt(BadRow(prompt.uuid, reason, prompt))
                else:
                    print_prompt(written, weight)


def _requests_of(
    open_input: Callable[[], OpenInput], planned: PlannedRun[Any, Any]
) -> RequestSource:
    return planned.checked(open_input().requests)
