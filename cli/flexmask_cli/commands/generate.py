"""``flexmask generate``: rows of a data set in, a file of generations out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from flexmask.errors import RequestError
from flexmask.fusion import Fusion
from flexmask_cli.dataset_options import RequestOptions
from flexmask_cli.generation_options import PlannedRun, RunOptions
from flexmask_cli.interrupt import Interrupt
from flexmask_cli.option_groups import takes_options
from flexmask_cli.option_kinds import flag, path
from flexmask_cli.options import BadRows, FusionOptions, StrategyOptions
from flexmask_cli.progress import track
from flexmask_cli.render.generation import (
    SHOWN_ANSWERS,
    print_answers,
    print_kernels,
    print_notes,
    print_outcome,
    print_prompt,
    print_stats,
)
from flexmask_cli.render.lines import print_warnings, warnings_as_lines
from flexmask_cli.strategy_choice import choose_strategy
from flexmask_cli.streams import run_goes_on

if TYPE_CHECKING:
    from flexmask.generation import Generation
    from flexmask.results.dataset_run import DatasetRun
    from flexmask.results.result_writer import ResultWriter
    from flexmask.tasks.request_source import RequestSource


@dataclass(frozen=True)
class OutputOptions:
    """Where the generations go, and what is printed."""

    heading: ClassVar[str] = "Output"

    output: Annotated[
        Path | None,
        path(
            "--output",
            "-o",
            help="A .feather, .parquet or .jsonl file. Default: "
            "outputs/<input>/<model>/<strategy>-<segments>.feather; with a fusion, "
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
    planned = PlannedRun(run, opened.task)
    if output.dry_run:
        skips = run.rows.on_error is BadRows.SKIP
        _print_prompts(opened.requests, fusion.chosen, planned, skips=skips)
        return

    from flexmask.results.dataset_run import DatasetRun
    from flexmask.results.output_path import check_output_name, default_output_path
    from flexmask.results.result_writer import ResultWriter

    path = output.output or default_output_path(
        opened.stem,
        planned.model_name,
        chosen.strategy.name,
        data.num_segments,
        str(fusion.chosen),
    )
    check_output_name(path)
    planned.check()
    generation: DatasetRun | None = None
    shown: list[Generation] = []
    with (
        run_goes_on(),
        warnings_as_lines(),
        ResultWriter.open(
            path,
            config=planned.config(*chosen, fusion.chosen, opened.name),
            requests=opened.requests,
            fusion=fusion.chosen,
            mode=run.results.mode,
            judge=planned.judge,
        ) as writer,
    ):
        if writer.remaining:
            engine = planned.load_engine()
            generation = DatasetRun(
                engine,
                chosen.strategy,
                writer,
                on_error=run.rows.on_bad_row,
                **planned.for_engine(),
            )
            if output.verbose:
                print_notes(engine, chosen.strategy, fusion.chosen, generation.generations)
            shown = _run(generation, writer, is_quiet=run.results.quiet)
            if output.verbose:
                print_kernels(engine)
    # Printed once the file is in place, since whoever reads the output may have left.
    if run.results.quiet:
        return
    if generation is not None:
        print_answers(shown, planned.judge)
        print_stats(generation.generations.stats, fusion.chosen)
    print_outcome(path, writer.summary, planned.judge)


def _run(run: DatasetRun, writer: ResultWriter, *, is_quiet: bool) -> list[Generation]:
    """Generate what is left to do; return the first generations, to be shown."""
    first: list[Generation] = []
    interrupt = Interrupt()
    try:
        with interrupt:
            for batch in track(run, len(writer.remaining), interrupt, is_quiet=is_quiet):
                first += batch[: SHOWN_ANSWERS - len(first)]
        if interrupt.is_requested and not writer.is_complete:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        kept = writer.summary.rows
        print_warnings([f"interrupted; {kept} rows are kept, --resume does the rest"])
        raise
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
