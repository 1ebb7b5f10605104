"""The request that `show` and `bench` work on: a row of an input, or one of given lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from flexmask.errors import OptionError, RequestError
from flexmask.limits import read_size
from flexmask_cli.dataset_options import OpenInput, RequestOptions
from flexmask_cli.engine_loading import load_tokenizer
from flexmask_cli.option_groups import changed_options
from flexmask_cli.option_kinds import size, text
from flexmask_cli.options import ChatOptions, ModelOptions

if TYPE_CHECKING:
    from flexmask.request import Request
    from flexmask.show.picture_source import Subject


class Lengths(NamedTuple):
    """Number of tokens of each part of a request."""

    prefix: int
    segments: tuple[int, ...]
    suffix: int


@dataclass(frozen=True)
class LengthOptions:
    """The row of an input; without an input, the lengths of a request without text."""

    heading: ClassVar[str] = "Request"

    row: Annotated[
        int | None, size("--row", help="Row of the input, from 1. Default: the first.")
    ] = None
    prefix: Annotated[
        int | None, size("--prefix", least=0, help="Without an input: tokens of the prefix.")
    ] = None
    segments: Annotated[
        str | None,
        text("--segments", metavar="N,…", help="Without an input: tokens of each segment."),
    ] = None
    suffix: Annotated[
        int | None, size("--suffix", help="Without an input: tokens of the suffix.")
    ] = None

    def __post_init__(self) -> None:
        """Check the lengths.

        Raises:
            OptionError: If one is not a positive number.
        """
        _ = self.segment_lengths

    @property
    def segment_lengths(self) -> tuple[int, ...] | None:
        """Tokens of each segment; None if not given."""
        if self.segments is None:
            return None
        form = "positive numbers as in 40,35,38"
        return tuple(
            read_size("--segments", length, form, given=self.segments)
            for length in self.segments.split(",")
        )

    def or_else(self, default: Lengths) -> Lengths:
        """Return the lengths, with those of ``default`` for parts that are not given."""
        return Lengths(
            default.prefix if self.prefix is None else self.prefix,
            self.segment_lengths or default.segments,
            self.suffix or default.suffix,
        )


@dataclass(frozen=True)
class OneRequestOptions:
    """One request: a row of an input as `generate` reads it, or a request of given lengths."""

    data: RequestOptions
    model: ModelOptions
    chat: ChatOptions
    lengths: LengthOptions

    def check(self) -> None:
        """Refuse options that would have no effect.

        Raises:
            OptionError: If there is one; it names the first.
        """
        lengths = [name for name in changed_options(self.lengths) if name != "--row"]
        if self.has_input and lengths:
            raise OptionError(f"{lengths[0]} is for a request without an input; leave it out")
        if self.has_input:
            return
        groups = (self.data, self.model, self.chat)
        of_input = [name for group in groups for name in changed_options(group)]
        if self.lengths.row is not None:
            of_input.append("--row")
        if of_input:
            raise OptionError(f"{of_input[0]} needs an --input or a --task")

    @property
    def has_input(self) -> bool:
        """True if the request is a row of an input or of a task's sample."""
        return self.data.input is not None or self.data.task is not None

    def subject(self, default: Lengths) -> Subject:
        """Return the request with its tokens, as the engine gets them.

        Args:
            default: Lengths for a request without an input.

        Raises:
            FlexMaskError: If the input has no such row, or the row cannot be used.
        """
        from flexmask.show.picture_source import subject_of_lengths, subject_of_request

        self.check()
        if not self.has_input:
            return subject_of_lengths(*self.lengths.or_else(default))
        opened = self.data.open(num_segments=self.data.num_segments, on_bad_row="skip")
        row = self.lengths.row or 1
        request = _request_of_row(opened, row)
        tokenize = load_tokenizer(self.model, self.chat, opened.task)
        heading = f"{Path(opened.name).name}, row {row}: {request.uuid}"
        return subject_of_request(request, tokenize, heading)


def _request_of_row(opened: OpenInput, row: int) -> Request:
    from flexmask.tasks.request_source import BadRow

    number = 0
    for number, request in enumerate(opened.requests, start=1):
        if number < row:
            continue
        if isinstance(request, BadRow):
            raise RequestError(request.error)
        return request
    raise RequestError(f"{opened.name}: --row must be 1 to {number}, got {row}")
