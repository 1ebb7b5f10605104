"""``flexmask bench``: attention itself, timed on one layout beside its peers and the floor."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from flexmask.errors import OptionError
from flexmask.limits import LARGEST_SIZE, read_size
from flexmask_cli import render
from flexmask_cli.options import (
    Device,
    Dtype,
    Parameters,
    StrategyName,
    parse_lengths,
    refuse_empty,
)
from flexmask_cli.strategy_choice import choose_strategy

if TYPE_CHECKING:
    from flexmask.show.picture_source import Subject

PREFIX, SEGMENTS, SUFFIX = 60, "40,35,38", 4

Prefix = Annotated[
    int | None,
    typer.Option(
        min=0, max=LARGEST_SIZE, help="Without an input: tokens of the prefix.  [default: 60]"
    ),
]
Segments = Annotated[
    str | None,
    typer.Option(help="Without an input: tokens of each segment.  [default: 40,35,38]"),
]
Suffix = Annotated[
    int | None,
    typer.Option(
        min=1, max=LARGEST_SIZE, help="Without an input: tokens of the suffix.  [default: 4]"
    ),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        "-i",
        callback=refuse_empty,
        help="Requests (JSON Lines); - for standard input.",
    ),
]
Row = Annotated[
    int | None,
    typer.Option(min=1, max=LARGEST_SIZE, help="Which row of the input, from 1.  [default: 1]"),
]
Model = Annotated[
    str | None,
    typer.Option(
        callback=refuse_empty,
        help="Whose tokenizer reads the input. Default: the bundled model's.",
    ),
]
HeadNumbers = Annotated[str, typer.Option("--heads", help="Query heads and key heads.")]
HeadDim = Annotated[int, typer.Option(min=1, max=LARGEST_SIZE, help="Size of a head.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def bench(
    strategy: StrategyName = "ensemble_isolation",
    param: Parameters = None,
    prefix: Prefix = None,
    segments: Segments = None,
    suffix: Suffix = None,
    input: Input = None,
    row: Row = None,
    model: Model = None,
    heads: HeadNumbers = "24:8",
    head_dim: HeadDim = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Time one call of attention on a layout, beside its peers and the floor."""
    chosen = choose_strategy(strategy, param)
    lengths = (prefix, segments, suffix)
    if input is not None and any(length is not None for length in lengths):
        raise OptionError("--prefix, --segments and --suffix make up a request; leave them out")
    if input is None and (row, model) != (None, None):
        raise OptionError("--row and --model need an --input")

    numbers = _parse_heads(heads)

    import torch

    from flexmask.bench.attention_timing import AttentionBench, Heads
    from flexmask.bench.machine import machine_stamp
    from flexmask.device import resolve_device, resolve_dtype

    shape = Heads(*numbers, head_dim)
    target = resolve_device(device)
    number_type = resolve_dtype(dtype, target)
    if not isinstance(number_type, torch.dtype):
        number_type = torch.bfloat16
    with render.warnings_as_lines():
        subject = _subject(input, row, model, lengths)
        layout = chosen.layout(subject.shown.tokens)
        case = AttentionBench(chosen, layout, shape, target, number_type)
        if not as_json:
            render.print_attention_case(subject, chosen, case)
        timings = []
        for timing in case.timings():
            timings.append(timing)
            render.print_passing(timing.way)
        floor = case.floor()
    if as_json:
        render.print_json(
            {
                "strategy": chosen.name,
                "parameters": chosen.parameter_values(),
                **case.figures(),
                "floor": asdict(floor),
                "ways": [asdict(timing) for timing in timings],
                "machine": machine_stamp(),
            }
        )
    else:
        render.print_attention_timings(timings, floor)


def _parse_heads(text: str) -> tuple[int, int]:
    query, separator, key = text.partition(":")
    form = "two numbers as in 24:8, or one"
    count = read_size("--heads", query, form, given=text)
    return count, read_size("--heads", key, form, given=text) if separator else count


def _subject(
    input: str | None,
    row: int | None,
    model: str | None,
    lengths: tuple[int | None, str | None, int | None],
) -> Subject:
    from flexmask.show.picture_source import subject_of_file, subject_of_lengths

    if input is not None:
        return subject_of_file(input, row or 1, model=model)
    prefix, segments, suffix = lengths
    return subject_of_lengths(
        PREFIX if prefix is None else prefix,
        parse_lengths(segments or SEGMENTS),
        SUFFIX if suffix is None else suffix,
    )
