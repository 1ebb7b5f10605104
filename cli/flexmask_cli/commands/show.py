"""``flexmask show``: who sees whom, in the terminal, as a figure or as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexmask.errors import OptionError
from flexmask.limits import LARGEST_SIZE
from flexmask_cli import render
from flexmask_cli.options import (
    Parameters,
    parse_lengths,
    parse_parameters,
    path_of,
    refuse_devices,
    refuse_empty,
)
from flexmask_cli.strategy_choice import choose_several, load_plugins, stdout_to_stderr

if TYPE_CHECKING:
    from flexmask.show.mask_picture import MaskDifference, MaskPicture
    from flexmask.show.picture_source import Subject
    from flexmask.strategy import Strategy

DEFAULT_STRATEGY = "ensemble_isolation"
DEFAULT_PREFIX, DEFAULT_SEGMENTS, DEFAULT_SUFFIX = 6, "8,6,7", 3
PAGE_NEW_TOKENS = 8
"""How many generated tokens a page steps through, where no result file says."""

File = Annotated[
    str | None,
    typer.Argument(
        metavar="FILE",
        callback=refuse_empty,
        help="Requests (JSON Lines), or a result file (.feather).",
    ),
]
Strategies = Annotated[
    list[str] | None,
    typer.Option(
        "--strategy",
        "-s",
        metavar="NAME[:KEY=VALUE]",
        help="Mask strategy; repeat it, or separate names by commas, to see several. "
        "Default: ensemble_isolation, or what made the result file.",
    ),
]
Against = Annotated[
    str | None,
    typer.Option(metavar="NAME[:KEY=VALUE]", help="Draw the difference to this strategy."),
]
Input = Annotated[
    str | None,
    typer.Option("--input", "-i", callback=refuse_empty, help="As FILE; - for standard input."),
]
Row = Annotated[
    int | None,
    typer.Option(min=1, max=LARGEST_SIZE, help="Which row of the file, from 1.  [default: 1]"),
]
NumSegments = Annotated[
    int | None,
    typer.Option(min=1, max=LARGEST_SIZE, help="Only the first segments of the request."),
]
Model = Annotated[
    str | None,
    typer.Option(
        callback=refuse_empty,
        help="Whose tokenizer. Default: the bundled model, or what made the result.",
    ),
]
Prefix = Annotated[
    int | None,
    typer.Option(
        min=0, max=LARGEST_SIZE, help="Without a file: tokens of the prefix.  [default: 6]"
    ),
]
Segments = Annotated[
    str | None,
    typer.Option(help="Without a file: tokens of each segment.  [default: 8,6,7]"),
]
Suffix = Annotated[
    int | None,
    typer.Option(
        min=1, max=LARGEST_SIZE, help="Without a file: tokens of the suffix.  [default: 3]"
    ),
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=LARGEST_SIZE,
        help="Rows that generation adds. Default: as generated; else 8 on a page, or none.",
    ),
]
Tile = Annotated[int, typer.Option(min=1, max=LARGEST_SIZE, help="Tokens along a side of a tile.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        parser=path_of("--output"),
        metavar="PATH",
        help="Write .png, .svg, .pdf or .html instead.",
    ),
]
Ascii = Annotated[bool, typer.Option("--ascii", help="Plain characters, as when piped.")]
Stats = Annotated[
    bool, typer.Option("--stats", help="Print figures of the BlockMask, not a picture.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


def show(
    file: File = None,
    strategy: Strategies = None,
    param: Parameters = None,
    against: Against = None,
    input: Input = None,
    row: Row = None,
    num_segments: NumSegments = None,
    model: Model = None,
    prefix: Prefix = None,
    segments: Segments = None,
    suffix: Suffix = None,
    new_tokens: NewTokens = None,
    tile: Tile = 128,
    output: Output = None,
    ascii: Ascii = False,
    stats: Stats = False,
    as_json: AsJson = False,
) -> None:
    """Draw who sees whom: a request's layout, and its mask under a strategy."""
    load_plugins()
    parameters = parse_parameters(param or [])
    strategies = choose_several(strategy or [], parameters if strategy else {})
    others = choose_several([against], {}) if against else []
    lengths = (prefix, segments, suffix)
    source = _source(file, input, lengths, (row, model, num_segments))
    if output is not None and (stats or as_json or ascii):
        raise OptionError("--output writes a picture; leave out --stats, --json and --ascii")
    if output is not None:
        _check_output(output, num_pictures=max(len(strategies), 1) * max(len(others), 1))

    with render.warnings_as_lines():
        subject = _subject(source, lengths, row=row or 1, model=model, num_segments=num_segments)
    if not strategies:
        strategies = _default_strategies(subject, parameters)
    subject = _with_new_tokens(subject, new_tokens, output)
    if stats or as_json:
        _print_figures(_masks([*strategies, *others], subject, tile), as_json)
    elif output is None:
        pictures = _differences(strategies, others, subject, tile)
        render.print_pictures(
            subject, pictures or _masks(strategies, subject, tile), is_ascii=ascii
        )
    else:
        _save(strategies, others, subject, tile, output)


def _source(
    file: str | None, input: str | None, lengths: tuple[object, ...], of_file: tuple[object, ...]
) -> str | None:
    """The one file that is named, if any; options that have no effect are refused."""
    if file is not None and input is not None:
        raise OptionError(f"one file at a time, got {file} and --input {input}")
    source = file or input
    if source is not None and Path(source).suffix:  # a result; pipes of a shell have none
        refuse_devices(Path(source))
    if source is not None and any(length is not None for length in lengths):
        raise OptionError(
            "--prefix, --segments and --suffix make up a request; leave them out with a file"
        )
    if source is None and any(option is not None for option in of_file):
        raise OptionError("--row, --model and --num-segments need a file to take a request from")
    return source


def _check_output(output: Path, num_pictures: int) -> None:
    from flexmask.show.picture_file import check_picture_path, is_page

    check_picture_path(output)
    if num_pictures > 1 and not is_page(output):
        raise OptionError(
            f"a figure shows one mask, got {num_pictures}; write an .html page, or name the "
            "second strategy with --against"
        )


def _subject(
    source: str | None,
    lengths: tuple[int | None, str | None, int | None],
    *,
    row: int,
    model: str | None,
    num_segments: int | None,
) -> Subject:
    from flexmask.show.picture_source import subject_of_file, subject_of_lengths

    if source is not None:
        return subject_of_file(source, row, model=model, num_segments=num_segments)
    prefix, segments, suffix = lengths
    return subject_of_lengths(
        DEFAULT_PREFIX if prefix is None else prefix,
        parse_lengths(segments or DEFAULT_SEGMENTS),
        suffix or DEFAULT_SUFFIX,
    )


def _default_strategies(subject: Subject, parameters: dict[str, str]) -> list[Strategy]:
    if subject.answer is None:
        return choose_several([DEFAULT_STRATEGY], parameters)
    if parameters:
        raise OptionError("--param needs --strategy; without it a result is shown as it was run")
    with render.warnings_as_lines(), stdout_to_stderr():
        return [subject.answer.strategy()]


def _with_new_tokens(subject: Subject, count: int | None, output: Path | None) -> Subject:
    from flexmask.show.picture_file import is_page

    if count is None and subject.answer is None and output is not None and is_page(output):
        count = PAGE_NEW_TOKENS
    return subject if count is None else subject.with_new_tokens(count)


@stdout_to_stderr()
def _masks(strategies: list[Strategy], subject: Subject, tile: int) -> list[MaskPicture]:
    from flexmask.show.mask_picture import draw_mask

    return [draw_mask(strategy, subject.shown, tile) for strategy in strategies]


@stdout_to_stderr()
def _differences(
    strategies: list[Strategy], others: list[Strategy], subject: Subject, tile: int
) -> list[MaskDifference]:
    from flexmask.show.mask_picture import draw_difference

    return [
        draw_difference(strategy, other, subject.shown, tile)
        for strategy in strategies
        for other in others
    ]


def _print_figures(pictures: list[MaskPicture], as_json: bool) -> None:
    figures = [picture.figures() for picture in pictures]
    if as_json:
        render.print_json(figures if len(figures) > 1 else figures[0])
    else:
        for each in figures:
            render.print_figures(each)


def _save(
    strategies: list[Strategy],
    others: list[Strategy],
    subject: Subject,
    tile: int,
    output: Path,
) -> None:
    from flexmask.show.picture_file import is_page

    differences = _differences(strategies, others, subject, tile)
    if is_page(output):
        from flexmask.show.mask_page import save_page

        save_page([*_masks([*strategies, *others], subject, tile), *differences], subject, output)
    else:
        from flexmask.show.figure import save_figure

        (picture,) = differences or _masks(strategies, subject, tile)
        save_figure(picture, output)
    render.print_line(f"wrote {output}")
