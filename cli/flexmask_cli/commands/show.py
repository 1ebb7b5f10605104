"""``flexmask show``: masks in the terminal, as a figure or as a page."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from flexmask.errors import OptionError
from flexmask_cli import completion
from flexmask_cli.option_groups import changed_options, takes_options
from flexmask_cli.option_kinds import flag, path, refuse_devices, refuse_empty, size, text
from flexmask_cli.options import Parameters
from flexmask_cli.render.lines import print_figures, print_json, print_line, warnings_as_lines
from flexmask_cli.render.pictures import print_pictures
from flexmask_cli.request_choice import Lengths, OneRequestOptions
from flexmask_cli.strategy_choice import choose_listed, load_plugins, stdout_to_stderr

if TYPE_CHECKING:
    from flexmask.show.mask_picture import MaskDifference, MaskPicture
    from flexmask.show.picture_source import Subject
    from flexmask.strategy import Strategy

DEFAULT_STRATEGY = "ensemble_isolation"
DEFAULT_LENGTHS = Lengths(6, (8, 6, 7), 3)
PAGE_NEW_TOKENS = 8
"""Generated tokens that a page steps through, unless a result file is shown."""


@dataclass(frozen=True)
class MaskOptions:
    """The masks to draw, and a file to take the request from."""

    heading: ClassVar[str] = "Mask"

    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            callback=refuse_empty,
            help="A result file (.feather), or an input as --input takes it.",
        ),
    ] = None
    strategy: Annotated[
        list[str],
        typer.Option(
            "--strategy",
            "-s",
            metavar="NAME[:KEY=VALUE]",
            autocompletion=completion.strategies,
            help="Mask strategy. Repeat it, or separate names by commas, to see several. "
            "Default: ensemble_isolation; for a result file, the strategy that made it.",
        ),
    ] = field(default_factory=list)
    param: Parameters = field(default_factory=list)
    against: Annotated[
        str | None,
        text(
            "--against",
            metavar="NAME[:KEY=VALUE]",
            completion=completion.strategies,
            help="Draw the difference to this strategy.",
        ),
    ] = None
    new_tokens: Annotated[
        int | None,
        size(
            "--new-tokens",
            least=0,
            help="Also draw the rows of N generated tokens. Default: as many as a result file "
            "holds; else 8 on a page, and none elsewhere.",
        ),
    ] = None
    tile: Annotated[int, size("--tile", help="Tokens along a side of a tile.")] = 128


@dataclass(frozen=True)
class PictureOptions:
    """The form of the picture."""

    heading: ClassVar[str] = "Output"

    output: Annotated[
        Path | None,
        path("--output", "-o", help="Write a .png, .svg, .pdf or .html file instead."),
    ] = None
    ascii: Annotated[bool, flag("--ascii", help="Draw with plain characters, as in a pipe.")] = (
        False
    )
    stats: Annotated[
        bool, flag("--stats", help="Print figures of the BlockMask and no picture.")
    ] = False
    as_json: Annotated[bool, flag("--json", help="Print the figures as JSON.")] = False

    def __post_init__(self) -> None:
        if self.output is not None and (self.stats or self.as_json or self.ascii):
            raise OptionError("--output writes a picture; leave out --stats, --json and --ascii")


@takes_options
def show(*, masks: MaskOptions, request: OneRequestOptions, picture: PictureOptions) -> None:
    """Draw the mask of a request under a strategy: which token sees which.

    The request is a row of an input, as flexmask generate makes it with the same options, or a
    row of a result file. Without either it has a prefix of 6 tokens, segments of 8, 6 and 7 and a
    suffix of 3 unless options say otherwise.
    """
    load_plugins()
    parameters = dict(masks.param)
    strategies = _listed(masks.strategy, parameters if masks.strategy else {})
    others = _listed([masks.against], {}) if masks.against else []
    result, request = _source(masks.file, request)
    if picture.output is not None:
        _check_output(picture.output, num_pictures=max(len(strategies), 1) * max(len(others), 1))

    with warnings_as_lines():
        subject = request.subject(DEFAULT_LENGTHS) if result is None else _row(result, request)
    if not strategies:
        strategies = _default_strategies(subject, parameters)
    subject = _with_new_tokens(subject, masks.new_tokens, picture.output)
    if picture.stats or picture.as_json:
        _print_figures(_masks([*strategies, *others], subject, masks.tile), picture.as_json)
    elif picture.output is None:
        pictures = _differences(strategies, others, subject, masks.tile)
        print_pictures(
            subject,
            pictures or _masks(strategies, subject, masks.tile),
            is_ascii=picture.ascii,
        )
    else:
        _save(strategies, others, subject, masks.tile, picture.output)


def _listed(texts: list[str], parameters: dict[str, str]) -> list[Strategy]:
    return [chosen.strategy for chosen in choose_listed(texts, parameters)]


def _source(file: str | None, request: OneRequestOptions) -> tuple[str | None, OneRequestOptions]:
    """Return the result file that FILE names, or else the request with FILE as its input.

    Raises:
        OptionError: If options have no effect.
    """
    from flexmask.results.formats import is_result

    if file is not None and request.data.input is not None:
        raise OptionError(f"one file at a time, got {file} and --input {request.data.input}")
    if file is None:
        request.check()
        return None, request
    if request.data.task is not None or not is_result(Path(file)):
        request = replace(request, data=replace(request.data, input=file))
        request.check()
        return None, request
    refuse_devices(Path(file))
    given = [*changed_options(request.data), *changed_options(request.chat)]
    given += [name for name in changed_options(request.lengths) if name != "--row"]
    if given:
        raise OptionError(f"{given[0]} is for requests; a result is shown as it was run")
    return file, request


def _row(result: str, request: OneRequestOptions) -> Subject:
    from flexmask.show.picture_source import subject_of_result

    return subject_of_result(
        result,
        request.lengths.row or 1,
        model=request.model.model,
        trust_remote_code=request.model.trust_remote_code,
    )


def _check_output(output: Path, num_pictures: int) -> None:
    from flexmask.show.picture_file import check_picture_path, is_page

    check_picture_path(output)
    if num_pictures > 1 and not is_page(output):
        raise OptionError(
            f"a figure shows one mask, got {num_pictures}; write an .html page, or name the "
            "second strategy with --against"
        )


def _default_strategies(subject: Subject, parameters: dict[str, str]) -> list[Strategy]:
    if subject.answer is None:
        return _listed([DEFAULT_STRATEGY], parameters)
    if parameters:
        raise OptionError("--param needs --strategy; without it a result is shown as it was run")
    with warnings_as_lines(), stdout_to_stderr():
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
        print_json(figures if len(figures) > 1 else figures[0])
    else:
        for each in figures:
            print_figures(each)


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
    print_line(f"wrote {output}")
