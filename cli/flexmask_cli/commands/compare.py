"""``flexmask compare``: strategies and fusions side by side on one data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexmask.errors import FlexMaskError
from flexmask.fusion import Fusion
from flexmask.limits import read_size
from flexmask_cli import render
from flexmask_cli.dataset_options import (
    Columns,
    DatasetOptions,
    Delimiter,
    Encoding,
    ExamplesSource,
    InputSource,
    Limit,
    NumExamples,
    Paraphrases,
    PrefixFile,
    TaskName,
)
from flexmask_cli.generation_options import DEMO, GenerationOptions
from flexmask_cli.interrupt import Interrupt
from flexmask_cli.options import (
    AllowSpecialTokens,
    BadRows,
    BatchSize,
    ChatTemplate,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    OnBadRow,
    Overwrite,
    PrefillKernelName,
    Quiet,
    Resume,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    parse_mode,
    path_of,
)
from flexmask_cli.progress import track
from flexmask_cli.strategy_choice import choose_named, load_plugins
from flexmask_cli.streams import run_goes_on

if TYPE_CHECKING:
    from flexmask.compare.cell import Cell, Way
    from flexmask.compare.comparison_run import CellRunner
    from flexmask.generation import Generation
    from flexmask.results.dataset_run import DatasetRun

Strategies = Annotated[
    str,
    typer.Option(
        "--strategies",
        "-s",
        metavar="NAME[:KEY=VALUE],…",
        help="Mask strategies, each with parameters of its own after a colon.",
    ),
]
Fusions = Annotated[
    str,
    typer.Option(
        metavar="NAME[:WEIGHTS],…",
        help="What else to compare with: fusions that run each segment alone, such as none, mean, "
        "max, vote (docs/compare.md).",
    ),
]
Counts = Annotated[
    str,
    typer.Option(
        "--num-segments", metavar="N,…", help="How many segments of each request; all for all."
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        parser=path_of("--output"),
        metavar="PATH",
        help="Folder for the report and the result files. "
        "Default: outputs/<input>/<model>/compare.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def compare(
    strategies: Strategies = "causal,prefix_segment,ensemble_isolation",
    fusions: Fusions = "none,mean",
    num_segments: Counts = "all",
    model: Model = None,
    task: TaskName = None,
    input: InputSource = None,
    output: Output = None,
    limit: Limit = None,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    column: Columns = None,
    paraphrases: Paraphrases = None,
    examples: ExamplesSource = None,
    num_examples: NumExamples = None,
    prefix_file: PrefixFile = None,
    chat_template: ChatTemplate = None,
    allow_special_tokens: AllowSpecialTokens = False,
    on_error: OnBadRow = BadRows.STOP,
    resume: Resume = False,
    overwrite: Overwrite = False,
    max_new_tokens: MaxNewTokens = 20,
    stop: Stop = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    batch_size: BatchSize = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    prefill_kernel: PrefillKernelName = "auto",
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare strategies, fusions and numbers of segments on one data set."""
    ways = _plan(strategies, fusions, num_segments)
    mode = parse_mode(resume, overwrite)
    dataset = DatasetOptions(
        task=task,
        input=input,
        columns=column or [],
        examples=examples,
        num_examples=num_examples,
        paraphrases=paraphrases,
        prefix_file=prefix_file,
        limit=limit,
        num_segments=None,
        on_error=on_error.value,
        delimiter=delimiter,
        encoding=encoding,
        fusion=_read_for(ways),
    )
    loaded_task = dataset.load_task()
    rows, requests = dataset.open(loaded_task)

    # Only now torch and what needs it: mistakes in the options above show at once.
    from flexmask.compare.comparison_run import CellRunner, ReportFolder, cut_to_counts
    from flexmask.compare.lone_prompt import with_plain_prompts
    from flexmask.compare.report import save_report
    from flexmask.compare.sameness import Sameness
    from flexmask.compare.table import tabulate
    from flexmask.results.output_path import default_folder

    options = GenerationOptions(
        task=loaded_task,
        model=model,
        device=device,
        dtype=dtype,
        prefill_kernel=prefill_kernel,
        trust_remote_code=trust_remote_code,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        stop=stop or [],
        chat_template=chat_template,
        allow_special_tokens=allow_special_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )
    options.check()
    ways = with_plain_prompts(ways)
    counts = dict.fromkeys(way.num_segments for way in ways)
    requests_of = cut_to_counts(requests, [*counts], on_error.value)
    sameness = Sameness(
        requests_of,
        options.load_tokenizer(),
        max_new_tokens,
        is_greedy=options.sampling.is_greedy,
    )
    with render.warnings_as_lines():
        cells = sameness.cells(ways)
    stem = rows.stem if input or task else DEMO
    folder = ReportFolder(output or default_folder(stem, model or DEMO) / "compare")
    runner = CellRunner(
        load_engine=cache(partial(options.load_engine, is_verbose=False)),
        folder=folder,
        requests_of=requests_of,
        config_of=lambda way: options.config(
            way.contender.reference, way.contender.strategy, way.fusion, rows.name
        ),
        judge=options.judge,
        mode=mode,
        machine=options.machine(),
        options=options.for_engine() | {"on_error": on_error.value},
    )
    runner.check(cells)
    with run_goes_on():
        with render.warnings_as_lines():
            if not all(map(runner.has_result, cells)):
                runner.load_engine()  # one that fails ends the run, and not each cell by itself
            errors = _run(runner, cells, is_quiet=quiet)
        results = tabulate(cells, folder, options.judge, errors)
        save_report(results, folder, options.judge)
    if as_json:
        render.print_json([result.figures() for result in results])
    else:
        render.print_comparison(results)
        render.print_line(f"\n{folder.page}")
    if errors:
        raise typer.Exit(1)


def _plan(strategies: str, fusions: str, num_segments: str) -> list[Way]:
    from flexmask.compare.cell import Contender, plan_ways

    load_plugins()
    return plan_ways(
        [Contender(*named) for named in choose_named([strategies], {})],
        [_parse_fusion(text) for text in fusions.split(",") if text.strip()],
        [_parse_count(text) for text in num_segments.split(",")],
    )


def _parse_fusion(text: str) -> Fusion:
    name, _, weights = text.strip().partition(":")
    return Fusion(name, weights or None)


def _read_for(ways: Sequence[Way]) -> Fusion:
    """A fusion that needs of the input what any of them needs."""
    weighted = (way.fusion for way in ways if way.fusion.weights == "column")
    return next(weighted, Fusion())


def _parse_count(text: str) -> int | None:
    text = text.strip()
    if text == "all":
        return None
    return read_size("--num-segments", text, "numbers as in 1,3,5 or all")


def _run(runner: CellRunner, cells: Sequence[Cell], *, is_quiet: bool) -> dict[Cell, str]:
    """Run every cell; give the reasons of those that failed."""
    errors: dict[Cell, str] = {}
    interrupt = Interrupt()

    def watch(run: DatasetRun, total: int) -> Iterator[Sequence[Generation]]:
        with interrupt:
            yield from track(run, total, interrupt, is_quiet=is_quiet)
        if interrupt.is_requested:
            raise KeyboardInterrupt

    for number, cell in enumerate(cells, start=1):
        if not is_quiet:
            render.print_note(f"{number} of {len(cells)}: {cell.title}")
        try:
            runner.run(cell, watch)
        except FlexMaskError as error:
            errors[cell] = str(error)
        except Exception as error:  # a plugin's, or torch's: the other cells go on
            render.print_fault()
            errors[cell] = f"{type(error).__name__}: {error}"
        except KeyboardInterrupt:
            render.print_warnings(
                [f"interrupted in cell {number} of {len(cells)}; --resume does the rest"]
            )
            raise
    return errors
