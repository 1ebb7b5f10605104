"""``flexmask generate``: requests in, a Feather file of generations out."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexmask.dataset.run_config import RunConfig
from flexmask.demo import model_path, questions_path
from flexmask.errors import OptionError
from flexmask.registry import load_registry, make_strategy
from flexmask.request import read_requests
from flexmask_cli import render
from flexmask_cli.options import Parameters, StrategyName, parse_parameters
from flexmask_cli.progress import track

if TYPE_CHECKING:
    from flexmask.dataset.results import OutputMode, ResultWriter
    from flexmask.engine import Engine
    from flexmask.strategy import Strategy

DEMO = "demo"

Model = Annotated[
    str | None, typer.Option(help="Hub id or folder. Default: the small bundled model.")
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        "-i",
        help="JSON Lines with segments and, as wanted, uuid, prefix, suffix, answers; "
        "- for standard input. Default: the bundled questions.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Feather file. Default: outputs/<input>/<model>/<strategy>-<segments>.feather.",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first requests.")]
NumSegments = Annotated[
    int | None, typer.Option(min=1, help="Only the first segments of each request.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens to generate per request.")]
BatchSize = Annotated[str, typer.Option(help="Requests that run together: a number or auto.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16 or float16; auto is float32 on a CPU and "
        "the model's own on a GPU."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Temperature = Annotated[
    float, typer.Option(help="0 takes the most likely token; more is more random.")
]
TopP = Annotated[float, typer.Option(help="Sample among tokens that reach this probability.")]
TopK = Annotated[int, typer.Option(help="Sample among this many tokens; 0 for all.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="Text that ends a generation; \\n is a newline. Repeatable."),
]
ChatTemplate = Annotated[
    bool, typer.Option("--chat-template/--no-chat-template", help="Use the model's chat template.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep the rows that are there, generate the rest.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what runs, and how.")]


def generate(
    strategy: StrategyName = "ensemble_isolation",
    param: Parameters = None,
    model: Model = None,
    input: Input = None,
    output: Output = None,
    limit: Limit = None,
    num_segments: NumSegments = None,
    max_new_tokens: MaxNewTokens = 20,
    batch_size: BatchSize = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    stop: Stop = None,
    chat_template: ChatTemplate = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = False,
) -> None:
    """Generate for each request under a mask strategy."""
    registry = load_registry()
    render.print_warnings(registry.problems())
    chosen = make_strategy(strategy, parse_parameters(param or []))
    mode = _parse_mode(resume, overwrite)
    requests = read_requests(input or str(questions_path()), num_segments=num_segments)[:limit]

    # Only now torch and what needs it: mistakes in the options above show at once.
    from flexmask.dataset.results import ResultWriter, default_output_path
    from flexmask.engine.loading import resolve_device, resolve_dtype
    from flexmask.engine.sampling import Sampling

    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampling": Sampling(temperature, top_k, top_p, seed),
        "stop": [text.replace("\\n", "\n").replace("\\t", "\t") for text in stop or []],
        "chat_template": chat_template,
    }
    target = resolve_device(device)
    resolve_dtype(dtype, target)
    config = RunConfig(
        run={
            "strategy": strategy,
            "parameters": chosen.parameter_values(),
            "model": model or DEMO,
            "dtype": dtype,
            **options,
            "sampling": asdict(options["sampling"]),
        },
        environment=_environment(device=str(target), batch_size=batch_size),
    )
    options["batch_size"] = _parse_batch_size(batch_size)
    path = output or default_output_path(input or DEMO, model or DEMO, strategy, num_segments)
    with ResultWriter.open(path, config=config, requests=requests, mode=mode) as writer:
        if writer.remaining:
            with render.warnings_as_lines():
                engine = _load_engine(model, device, dtype, trust_remote_code, verbose)
                _run(engine, chosen, options, writer, verbose)
    render.print_line(f"{writer.summary.rows} rows in {path}")


def _run(
    engine: Engine,
    strategy: Strategy,
    options: dict[str, Any],
    writer: ResultWriter,
    verbose: bool,
) -> None:
    generations = engine.generate(writer.remaining, strategy, **options)
    if verbose:
        render.print_notes(engine, strategy, generations.stats)
    first = []
    try:
        for generation in track(generations, len(writer.remaining)):
            writer.write([generation])
            first.append(generation)
            del first[render.SHOWN_ANSWERS :]
    except KeyboardInterrupt:
        kept = writer.summary.rows
        render.print_warnings([f"interrupted; {kept} rows are kept, --resume does the rest"])
        raise
    render.print_answers(first)
    render.print_summary(generations.stats, writer.summary)


def _load_engine(
    model: str | None, device: str, dtype: str, trust_remote_code: bool, verbose: bool
) -> Engine:
    from transformers.utils import logging

    from flexmask.engine import Engine

    if not verbose:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return Engine.from_pretrained(
        model or str(model_path()),
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


def _parse_batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise OptionError(f"--batch-size must be a positive number or auto, got {text!r}")
    return int(text)


def _parse_mode(resume: bool, overwrite: bool) -> OutputMode:
    if resume and overwrite:
        raise OptionError("--resume and --overwrite exclude each other")
    return "resume" if resume else "overwrite" if overwrite else "new"


def _environment(**more: str) -> dict[str, str]:
    versions = {name: version(name) for name in ("flexmask", "torch", "transformers")}
    return {**versions, **more}
