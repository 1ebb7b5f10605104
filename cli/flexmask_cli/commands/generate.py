"""``flexmask generate``: rows of a data set in, a file of generations out."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexmask.dataset.run_config import RunConfig
from flexmask.demo import model_path
from flexmask.strategy_file import recorded_name
from flexmask_cli import render
from flexmask_cli.dataset_options import (
    Columns,
    DatasetOptions,
    ExamplesSource,
    InputSource,
    Limit,
    NumExamples,
    NumSegments,
    Paraphrases,
    PrefixFile,
    TaskName,
)
from flexmask_cli.interrupt import Interrupt
from flexmask_cli.loading import load_engine
from flexmask_cli.options import (
    BadRows,
    BatchSize,
    ChatTemplate,
    Device,
    Dtype,
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
    parse_batch_size,
    parse_mode,
    parse_prefill_kernel,
)
from flexmask_cli.progress import track
from flexmask_cli.strategy_choice import choose_strategy

if TYPE_CHECKING:
    from flexmask.dataset.requests import RequestSource
    from flexmask.dataset.results import ResultWriter
    from flexmask.engine import Engine
    from flexmask.generation import Generation
    from flexmask.strategy import Strategy

DEMO = "demo"

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="A .feather, .parquet or .jsonl file. "
        "Default: outputs/<input>/<model>/<strategy>-<segments>.feather.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the prompts and end.")]


def generate(
    strategy: StrategyName = "ensemble_isolation",
    param: Parameters = None,
    model: Model = None,
    task: TaskName = None,
    input: InputSource = None,
    output: Output = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    column: Columns = None,
    paraphrases: Paraphrases = None,
    num_segments: NumSegments = None,
    examples: ExamplesSource = None,
    num_examples: NumExamples = None,
    prefix_file: PrefixFile = None,
    chat_template: ChatTemplate = None,
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
    )
    loaded_task = dataset.load_task()
    rows, requests = dataset.open(loaded_task)
    if chat_template is None:
        chat_template = loaded_task is not None and loaded_task.chat_template
    if dry_run:
        _print_prompts(requests, model, chat_template, trust_remote_code)
        return

    # Only now torch and what needs it: mistakes in the options above show at once.
    from flexmask.dataset.judge import Judge
    from flexmask.dataset.place import default_output_path
    from flexmask.dataset.results import ResultWriter
    from flexmask.engine.loading import resolve_device, resolve_dtype
    from flexmask.engine.sampling import Sampling

    judge = loaded_task.judge if loaded_task else Judge()
    judge.check()
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampling": Sampling(temperature, top_k, top_p, seed),
        "stop": [text.replace("\\n", "\n").replace("\\t", "\t") for text in stop or []],
        "chat_template": chat_template,
    }
    kernel = parse_prefill_kernel(prefill_kernel)
    target = resolve_device(device)
    resolve_dtype(dtype, target)
    config = RunConfig(
        run={
            "strategy": recorded_name(strategy),
            "parameters": chosen.parameter_values(),
            "model": model or DEMO,
            "dtype": dtype,
            "task": loaded_task and loaded_task.record(),
            "judge": asdict(judge),
            **options,
            "sampling": asdict(options["sampling"]),
        },
        environment=_environment(device=str(target), batch_size=batch_size, input=rows.name),
    )
    options |= {"batch_size": parse_batch_size(batch_size), "on_error": on_error.value}
    stem = rows.stem if input or task else DEMO
    path = output or default_output_path(stem, model or DEMO, chosen.name, num_segments)
    with ResultWriter.open(
        path, config=config, requests=requests, mode=mode, judge=judge
    ) as writer:
        if writer.remaining:
            with render.warnings_as_lines():
                engine = load_engine(model, device, dtype, trust_remote_code, verbose, kernel)
                _run(engine, chosen, options, writer, is_quiet=quiet, is_verbose=verbose)
    if not quiet:
        render.print_outcome(path, writer.summary, judge)


def _run(
    engine: Engine,
    strategy: Strategy,
    options: dict[str, Any],
    writer: ResultWriter,
    *,
    is_quiet: bool,
    is_verbose: bool,
) -> None:
    from flexmask.dataset.run import DatasetRun

    run = DatasetRun(engine, strategy, writer, **options)
    if is_verbose:
        render.print_notes(engine, strategy, run.generations.stats)
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
    if is_verbose:
        render.print_kernels(engine)
    if not is_quiet:
        render.print_answers(first, writer.judge)
        render.print_stats(run.generations.stats)


def _print_prompts(
    requests: RequestSource, model: str | None, chat_template: bool, trust_remote_code: bool
) -> None:
    in_chat = None
    if chat_template:
        from flexmask.tokenization import RequestTokenizer, load_tokenizer

        tokenizer = load_tokenizer(model or str(model_path()), trust_remote_code=trust_remote_code)
        in_chat = RequestTokenizer(tokenizer, chat_template=True).in_chat
    for request in requests:
        render.print_prompt(request, in_chat)


def _environment(**more: str) -> dict[str, str]:
    versions = {name: version(name) for name in ("flexmask", "torch", "transformers")}
    return {**versions, **more}
