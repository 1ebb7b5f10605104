"""``flexmask generate``: rows of a data set in, a file of generations out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexmask.errors import RequestError
from flexmask.fusion import Fusion
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
    NumSegments,
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
    FusionName,
    FusionWeights,
    MaxNewTokens,
    Model,
    OnBadRow,
    Overwrite,
    Parameters,
    PrefillKernelName,
    Quiet,
    Resume,
    Seed,
    Stop,
    StrategyName,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    Verbose,
    parse_mode,
    path_of,
)
from flexmask_cli.progress import track
from flexmask_cli.strategy_choice import choose_strategy
from flexmask_cli.streams import run_goes_on

if TYPE_CHECKING:
    from flexmask.generation import Generation
    from flexmask.results.dataset_run import DatasetRun
    from flexmask.results.result_writer import ResultWriter
    from flexmask.tasks.request_source import RequestSource

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        parser=path_of("--output"),
        metavar="PATH",
        help="A .feather, .parquet or .jsonl file. "
        "Default: outputs/<input>/<model>/<strategy>-<segments>.feather, with the fusion between "
        "those two unless it is attention.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the prompts and end.")]


def generate(
    strategy: StrategyName = "ensemble_isolation",
    param: Parameters = None,
    fusion: FusionName = "attention",
    fusion_weights: FusionWeights = None,
    model: Model = None,
    task: TaskName = None,
    input: InputSource = None,
    output: Output = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    column: Columns = None,
    paraphrases: Paraphrases = None,
    num_segments: NumSegments = None,
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
    verbose: Verbose = False,
) -> None:
    """Generate for each row of a data set under a mask strategy."""
    chosen = choose_strategy(strategy, param)
    fused = Fusion(fusion, fusion_weights)
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
        num_segments=num_segments,
        on_error=on_error.value,
        delimiter=delimiter,
        encoding=encoding,
        fusion=fused,
    )
    loaded_task = dataset.load_task()
    rows, requests = dataset.open(loaded_task)
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
    if dry_run:
        _print_prompts(requests, fused, options, skips=on_error is BadRows.SKIP)
        return

    # Only now torch and what needs it: mistakes in the options above show at once.
    from flexmask.results.dataset_run import DatasetRun
    from flexmask.results.output_path import default_output_path
    from flexmask.results.result_writer import ResultWriter

    options.check()
    judge = options.judge
    config = options.config(strategy, chosen, fused, rows.name)
    stem = rows.stem if input or task else DEMO
    path = output or default_output_path(
        stem, model or DEMO, chosen.name, num_segments, str(fused)
    )
    run: DatasetRun | None = None
    shown: list[Generation] = []
    with (
        run_goes_on(),
        render.warnings_as_lines(),
        ResultWriter.open(
            path, config=config, requests=requests, fusion=fused, mode=mode, judge=judge
        ) as writer,
    ):
        if writer.remaining:
            engine = options.load_engine(is_verbose=verbose)
            run = DatasetRun(
                engine,
                chosen,
                writer,
                on_error=on_error.value,
                **options.for_engine(),
            )
            if verbose:
                render.print_notes(engine, chosen, fused, run.generations)
            shown = _run(run, writer, is_quiet=quiet)
            if verbose:
                render.print_kernels(engine)
    # Only now, with the file in place: what is printed may go to somebody who has left.
    if quiet:
        return
    if run is not None:
        render.print_answers(shown, judge)
        render.print_stats(run.generations.stats, fused)
    render.print_outcome(path, writer.summary, judge)


def _run(run: DatasetRun, writer: ResultWriter, *, is_quiet: bool) -> list[Generation]:
    """Generate all that is left; gives the first of it, to be shown."""
    first: list[Generation] = []
    interrupt = Interrupt()
    try:
        with interrupt:
            for batch in track(run, len(writer.remaining), interrupt, is_quiet=is_quiet):
                first += batch[: render.SHOWN_ANSWERS - len(first)]
        if interrupt.is_requested and not writer.is_complete:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        kept = writer.summary.rows
        render.print_warnings([f"interrupted; {kept} rows are kept, --resume does the rest"])
        raise
    return first


def _print_prompts(
    requests: RequestSource, fusion: Fusion, options: GenerationOptions, *, skips: bool
) -> None:
    from flexmask.tasks.request_source import BadRow

    tokenize = options.load_tokenizer() if options.uses_chat_template else None
    for request in requests:
        if isinstance(request, BadRow):
            render.print_prompt(request)
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
                render.print_prompt(BadRow(prompt.uuid, reason, prompt))
            else:
                render.print_prompt(written, weight)
