"""``flexmask generate``: generates for the rows of a data set, into a result file."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from flexmask.errors import OptionError, RequestError
from flexmask.fusion import Fusion
from flexmask_cli.cluster_run import check_input, first_generations, generate_on_cluster
from flexmask_cli.dataset_options import OpenInput, RequestOptions
from flexmask_cli.generation_options import PlannedRun, RunOptions
from flexmask_cli.interrupt import Interrupt
from flexmask_cli.option_groups import takes_options
from flexmask_cli.option_kinds import flag, path
from flexmask_cli.options import BadRows, FusionOptions, StrategyOptions
from flexmask_cli.progress import track
from flexmask_cli.render.generation import (
    SHOWN_ANSWERS,
    outcome_figures,
    print_answers,
    print_kernels,
    print_notes,
    print_outcome,
    print_prompt,
    print_stats,
)
from flexmask_cli.render.lines import (
    print_json,
    print_json_line,
    print_warnings,
    warnings_as_lines,
)
from flexmask_cli.scaling_options import ScalingOptions
from flexmask_cli.strategy_choice import ChosenStrategy, choose_strategy
from flexmask_cli.streams import run_goes_on, write_text

if TYPE_CHECKING:
    from flexmask.engine import Engine, RunStats
    from flexmask.generation import Generation
    from flexmask.results.dataset_run import DatasetJob, DatasetRun
    from flexmask.results.result_writer import ResultWriter
    from flexmask.results.row_stream import RowStream
    from flexmask.strategy import Strategy
    from flexmask.tasks.request_source import RequestSource

STDOUT = Path("-")
"""Value of ``--output`` for standard output."""


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
            "<strategy>-<fusion>-<segments>.feather.",
        ),
    ] = None
    dry_run: Annotated[bool, flag("--dry-run", help="Print the prompts and generate nothing.")] = (
        False
    )
    verbose: Annotated[
        bool,
        flag("--verbose", "-v", help="Also print the model, its attention layers and kernels."),
    ] = False
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


@takes_options
def generate(
    *,
    strategy: StrategyOptions,
    fusion: FusionOptions,
    data: RequestOptions,
    output: OutputOptions,
    run: RunOptions,
    scaling: ScalingOptions,
) -> None:
    """Generate an answer for each row of a data set, under a mask strategy."""
    choose = partial(choose_strategy, strategy.strategy, strategy.parameters)
    chosen = choose()
    open_input = partial(
        data.open,
        fusion=fusion.chosen,
        num_segments=data.num_segments,
        limit=run.rows.limit,
        on_bad_row=run.rows.on_bad_row,
    )
    opened = open_input()
    planned = PlannedRun(run, opened.task)
    requests = planned.checked(opened.requests)
    if output.dry_run:
        skips = run.rows.on_error is BadRows.SKIP
        _print_prompts(scaling.rows_of(requests), fusion.chosen, planned, skips=skips)
        return

    if output.output == STDOUT:
        if scaling.is_on_ray:
            raise OptionError("--engine ray writes a file; leave out --output -")
        planned.check()
        with warnings_as_lines():
            requests = scaling.rows_of(requests)
            _write_stream(planned, chosen, fusion.chosen, requests, output)
        return

    from flexmask.results.output_path import check_output_name, default_output_path

    path = output.output or default_output_path(
        opened.stem,
        planned.model_name,
        chosen.strategy.name,
        data.num_segments,
        str(fusion.chosen),
        scaling.chosen_shard,
    )
    check_output_name(path)
    planned.check(is_elsewhere=scaling.is_on_ray)
    with run_goes_on(), warnings_as_lines():
        if scaling.is_on_ray:
            check_input(data.input)
            job = planned.job(
                choose, partial(_requests_of, open_input, planned), fusion.chosen, opened.name
            )
            outcome = generate_on_cluster(
                job,
                path,
                run.results.mode,
                scaling,
                run.engine.device,
                is_quiet=run.results.quiet,
                is_verbose=output.verbose,
            )
            summary, stats = outcome.summary, outcome.stats
            shown = [] if stats is None else first_generations(path, SHOWN_ANSWERS)
        else:
            requests = scaling.rows_of(requests)
            job = planned.job(lambda: chosen, lambda: requests, fusion.chosen, opened.name)
            with job.open_writer(path, requests, run.results.mode, requests.shard) as writer:
                shown, stats = _generate_rest(job, writer, output, is_quiet=run.results.quiet)
            summary = writer.summary
    # Printed when the file is in place, since stdout may be a pipe whose reader has exited.
    if output.as_json:
        print_json(outcome_figures(path, summary, planned.judge, stats))
    elif not run.results.quiet:
        if stats is not None:
            if shown:
                print_answers(shown, planned.judge)
            print_stats(stats, fusion.chosen)
        print_outcome(path, summary, planned.judge)


def _requests_of(open_input: Callable[[], OpenInput], planned: PlannedRun) -> RequestSource:
    return planned.checked(open_input().requests)


def _write_stream(
    planned: PlannedRun,
    chosen: ChosenStrategy,
    fusion: Fusion,
    requests: RequestSource,
    output: OutputOptions,
) -> None:
    """Generate for all requests, and write their rows to stdout as JSON Lines."""
    from flexmask.results.row_stream import RowStream

    if planned.options.results.mode != "new":
        raise OptionError("standard output holds no rows; leave out --resume and --overwrite")
    stream = RowStream(print_json_line, requests=requests, fusion=fusion, judge=planned.judge)
    job = planned.job(lambda: chosen, lambda: requests, fusion, requests.rows.name)
    _generate_rest(job, stream, output, is_quiet=planned.options.results.quiet)


def _generate_rest(
    job: DatasetJob, writer: ResultWriter | RowStream, output: OutputOptions, *, is_quiet: bool
) -> tuple[list[Generation], RunStats | None]:
    """Generate for the remaining requests; load the model only if there are some.

    Returns:
        The first generations, to be shown, and the statistics of the run; None without a run.
    """
    if not writer.remaining:
        return [], None
    engine, strategy = job.load_engine(), job.make_strategy()
    if _is_streamed(job, writer, output, is_quiet=is_quiet):
        return [], _stream(engine, strategy, job, writer, output)
    run = job.run(engine, strategy, writer)
    if output.verbose:
        print_notes(engine, strategy, job.fusion, run.generations)
    try:
        shown = _run(run, writer, is_quiet=is_quiet)
    except KeyboardInterrupt:
        rows = writer.summary.rows
        done = "were printed" if output.output == STDOUT else "are kept, --resume does the rest"
        print_warnings([f"interrupted; {rows} rows {done}"])
        raise
    if output.verbose:
        print_kernels(engine)
    return shown, run.generations.stats


def _is_streamed(
    job: DatasetJob, writer: ResultWriter | RowStream, output: OutputOptions, *, is_quiet: bool
) -> bool:
    """Return True if the one answer of a run is printed to a terminal as it is generated."""
    prints_text = not (output.as_json or output.output == STDOUT or is_quiet)
    is_one = len(writer.remaining) == 1 and job.fusion.name not in ("vote", "each")
    return is_one and prints_text and _is_terminal()


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _stream(
    engine: Engine,
    strategy: Strategy,
    job: DatasetJob,
    writer: ResultWriter | RowStream,
    output: OutputOptions,
) -> RunStats | None:
    """Generate for the one request, print its text meanwhile, and write its row."""
    from flexmask.tasks.request_source import BadRow

    (request,) = writer.remaining
    options = {name: value for name, value in job.options.items() if name != "batch_size"}
    try:
        stream = engine.stream(request, strategy, fusion=writer.fusion, **options)
        if output.verbose:
            print_notes(engine, strategy, job.fusion, stream.run)
        for piece in stream:
            write_text(piece, end="")
    except RequestError as error:
        if job.on_error == "stop":
            raise
        writer.write([BadRow(request.uuid, str(error), request)])
        return None
    write_text("")
    writer.write([stream.generation])
    if output.verbose:
        print_kernels(engine)
    return stream.run.stats


def _run(run: DatasetRun, writer: ResultWriter | RowStream, *, is_quiet: bool) -> list[Generation]:
    """Generate; return the first generations."""
    first: list[Generation] = []
    interrupt = Interrupt()
    with interrupt:
        for batch in track(run, len(writer.remaining), interrupt, is_quiet=is_quiet):
            first += batch[: SHOWN_ANSWERS - len(first)]
    if interrupt.is_requested and not writer.is_complete:
        raise KeyboardInterrupt
    return first


def _print_prompts(
    requests: RequestSource, fusion: Fusion, run: PlannedRun, *, skips: bool
) -> None:
    from flexmask.tasks.request_source import BadRow

    tokenize = run.load_tokenizer() if run.uses_chat_template else None
    for request in requests:
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
