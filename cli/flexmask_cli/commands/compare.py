"""``flexmask compare``: strategies and fusions side by side on one data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from flexmask.errors import FlexMaskError, OptionError
from flexmask.fusion import Fusion, check_score_fusion
from flexmask.limits import read_size
from flexmask_cli.dataset_options import InputOptions
from flexmask_cli.generation_options import LogprobOptions, PlannedGeneration, RunOptions
from flexmask_cli.interrupt import Interrupt
from flexmask_cli.option_groups import changed_options, takes_options
from flexmask_cli.option_kinds import flag, path, text
from flexmask_cli.options import AsJson
from flexmask_cli.planned_run import PlannedRun
from flexmask_cli.progress import track
from flexmask_cli.render.comparison import print_comparison
from flexmask_cli.render.lines import (
    print_fault,
    print_json,
    print_line,
    print_warnings,
    warnings_as_lines,
)
from flexmask_cli.score_options import NormalizeOptions, PlannedScoring
from flexmask_cli.strategy_choice import ChosenStrategy, choose_listed, load_plugins
from flexmask_cli.streams import run_goes_on

if TYPE_CHECKING:
    from flexmask.compare.cell import Cell, Way
    from flexmask.compare.comparison_run import CellRunner
    from flexmask.results.dataset_run import DatasetJob, DatasetRun
    from flexmask.tasks.task import Task


@dataclass(frozen=True)
class PlanOptions:
    """The strategies, fusions and numbers of segments to compare."""

    heading: ClassVar[str] = "Comparison"

    strategies: Annotated[
        str,
        text(
            "--strategies",
            "-s",
            metavar="NAME[:KEY=VALUE],…",
            help="Mask strategies, separated by commas, each with parameters of its own after "
            "a colon.",
        ),
    ] = "causal,prefix_segment,ensemble_isolation"
    fusions: Annotated[
        str,
        typer.Option(
            metavar="NAME[:WEIGHTS],…",
            help="Fusions to compare with, such as none, mean, max or vote, which make each "
            "segment a prompt of its own (docs/compare.md).",
        ),
    ] = "none,mean"
    num_segments: Annotated[
        str,
        text(
            "--num-segments",
            metavar="N,…",
            help="How many segments of each request to use, one comparison for each number; all "
            "uses all.",
        ),
    ] = "all"


@dataclass(frozen=True)
class ChoiceOptions(NormalizeOptions):
    """Scoring of choices in place of generating."""

    heading: ClassVar[str] = "Comparison"

    score: Annotated[
        bool,
        flag(
            "--score",
            help="Score the choices of each row, as 'flexmask score' does, and generate nothing; "
            "accuracy is that of the most likely choice.",
        ),
    ] = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionError: If the normalization is unknown, or nothing is scored.
        """
        super().__post_init__()
        if not self.score and changed_options(self):
            raise OptionError("--normalize needs --score")

    @property
    def folder_name(self) -> str:
        """The name of the report's folder, if the user names none."""
        return "compare-scores" if self.score else "compare"

    def check(self, ways: Sequence[Way], run: RunOptions, tokens: LogprobOptions) -> None:
        """Check that ways can score choices, or generate, and that no option is without effect.

        Raises:
            OptionError: If a fusion cannot, or an option changes generations and there are none.
        """
        for way in ways:
            if self.score:
                check_score_fusion(way.fusion)
            else:
                way.fusion.check_samples(is_greedy=run.sampling.sampling.is_greedy)
        if self.score and (names := run.changed_for_generation + changed_options(tokens)):
            raise OptionError(f"--score generates nothing; leave out {', '.join(names)}")

    def plan(
        self, run: RunOptions, task: Task | None, tokens: LogprobOptions
    ) -> PlannedRun[Any, Any]:
        """Return the run of each way."""
        if self.score:
            return PlannedScoring(run, task, self.chosen_normalization)
        return PlannedGeneration(run, task, tokens)


@dataclass(frozen=True)
class OutputOptions:
    """The output of a comparison."""

    heading: ClassVar[str] = "Output"

    output: Annotated[
        Path | None,
        path(
            "--output",
            "-o",
            help="Folder for the report and the result files. "
            "Default: outputs/<input>/<model>/compare; with --score, compare-scores.",
        ),
    ] = None
    as_json: AsJson = False


@takes_options
def compare(
    *,
    plan: PlanOptions,
    choices: ChoiceOptions,
    data: InputOptions,
    output: OutputOptions,
    run: RunOptions,
    tokens: LogprobOptions,
) -> None:
    """Compare strategies, fusions and numbers of segments on one data set."""
    ways = _plan(plan)
    choices.check(ways, run, tokens)
    opened = data.open(
        fusion=_read_for(ways),
        limit=run.rows.limit,
        on_bad_row=run.rows.on_bad_row,
        reads_choices=choices.score,
    )
    planned = choices.plan(run, opened.task, tokens)

    # Imported only now, since these import torch: wrong options are reported before.
    from flexmask.compare.comparison_run import CellRunner, ReportFolder, cut_to_counts
    from flexmask.compare.lone_prompt import with_plain_prompts
    from flexmask.compare.report import save_report
    from flexmask.compare.sameness import Sameness
    from flexmask.compare.table import tabulate
    from flexmask.results.output_path import default_folder

    planned.check()
    ways = with_plain_prompts(ways)
    counts = dict.fromkeys(way.num_segments for way in ways)
    requests = planned.checked(opened.requests)
    requests_of = cut_to_counts(requests, [*counts], run.rows.on_bad_row)
    sameness = Sameness(
        requests_of,
        planned.load_tokenizer(),
        0 if choices.score else run.batch.max_new_tokens,
        is_greedy=run.sampling.sampling.is_greedy,
    )
    with warnings_as_lines():
        cells = sameness.cells(ways)
    folder = ReportFolder(
        output.output
        or default_folder(opened.stem, planned.model_name, **run.model.changes)
        / choices.folder_name
    )

    def job_of(way: Way) -> DatasetJob[Any]:
        chosen = ChosenStrategy(way.contender.reference, way.contender.strategy)
        return planned.job(lambda: chosen, lambda: requests, way.fusion, opened.name)

    runner = CellRunner(
        load_engine=cache(planned.load_engine),
        folder=folder,
        requests_of=requests_of,
        job_of=job_of,
        mode=run.results.mode,
        machine=planned.machine(),
    )
    runner.check(cells)
    with run_goes_on():
        with warnings_as_lines():
            if not all(map(runner.has_result, cells)):
                runner.load_engine()  # if this fails, no cell can run
            errors = _run(runner, cells, is_quiet=run.results.quiet)
        results = tabulate(cells, folder, planned.judge, errors)
        save_report(results, folder, planned.judge)
    if output.as_json:
        print_json([result.figures() for result in results])
    else:
        print_comparison(results)
        print_line(f"\n{folder.page}")
    if errors:
        raise typer.Exit(1)


def _plan(options: PlanOptions) -> list[Way]:
    from flexmask.compare.cell import Contender, plan_ways

    load_plugins()
    return plan_ways(
        [Contender(*chosen) for chosen in choose_listed([options.strategies], {})],
        [_parse_fusion(text) for text in options.fusions.split(",") if text.strip()],
        [_parse_count(text) for text in options.num_segments.split(",")],
    )


def _parse_fusion(text: str) -> Fusion:
    name, _, weights = text.strip().partition(":")
    return Fusion(name, weights or None)


def _read_for(ways: Sequence[Way]) -> Fusion:
    """Return a fusion that reads weights from the input if one of the ways does."""
    weighted = (way.fusion for way in ways if way.fusion.weights == "column")
    return next(weighted, Fusion())


def _parse_count(text: str) -> int | None:
    text = text.strip()
    if text == "all":
        return None
    return read_size("--num-segments", text, "numbers as in 1,3,5 or all")


def _run(runner: CellRunner, cells: Sequence[Cell], *, is_quiet: bool) -> dict[Cell, str]:
    """Run every cell; return the errors of those that failed."""
    errors: dict[Cell, str] = {}
    interrupt = Interrupt()

    def watch(title: str, run: DatasetRun[Any], total: int) -> Iterator[Sequence[Any]]:
        with interrupt:
            yield from track(run, total, interrupt, is_quiet=is_quiet, title=title)
        if interrupt.is_requested:
            raise KeyboardInterrupt

    for number, cell in enumerate(cells, start=1):
        try:
            runner.run(cell, partial(watch, f"{number} of {len(cells)}: {cell.title}"))
        except FlexMaskError as error:
            errors[cell] = str(error)
        except Exception as error:  # of a plugin or of torch: the other cells run
            print_fault()
            errors[cell] = f"{type(error).__name__}: {error}"
        except KeyboardInterrupt:
            print_warnings(
                [f"interrupted in cell {number} of {len(cells)}; --resume does the rest"]
            )
            raise
    return errors
