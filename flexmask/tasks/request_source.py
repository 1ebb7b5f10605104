"""Reads requests from the rows of an input; bad rows stop the reading or are reported."""

from __future__ import annotations

import sys
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, Protocol

from flexmask.errors import JudgeError, OptionError, RequestError
from flexmask.fusion import Fusion
from flexmask.inputs.columns import Columns, MissingColumnError
from flexmask.inputs.input_files import open_input
from flexmask.inputs.rows import Input, Row
from flexmask.inputs.text_format import TextFormat
from flexmask.request import Request, RequestKey, check_choices, choice_index
from flexmask.tasks.judge import ChoiceJudge, Judge
from flexmask.tasks.shards import InputPart, ShardRecord

OnError = Literal["stop", "skip"]
"""Effect of a bad row: ``stop`` raises an error, ``skip`` yields a `BadRow`."""

FIELDS = (
    *("uuid", "prefix", "segments", "suffix", "answers", "weights"),
    *("system", "messages", "answer_prefix", "choices", "answer"),
)
"""Columns that a request is read from if there is no task; ``weights``, ``choices`` and ``answer``
are read only where they are used."""

MAX_CHARACTERS = 8 * 2**20
"""Size limit of a request. A million tokens of English are some five million characters;
tokenizing more than any model takes would cost gigabytes and many seconds before the refusal."""


@dataclass(frozen=True)
class BadRow:
    """A row that nothing can be generated for.

    Attributes:
        uuid: The row's uuid, or ``file:line`` if it has none or another row has the same.
        error: ``file:line`` and the reason.
        request: Its request, if the row is valid but the model cannot take it; else None.
    """

    uuid: str
    error: str
    request: Request | None = None

    @property
    def key(self) -> RequestKey:
        """As `Request.key`."""
        if self.request is None:
            return RequestKey(self.uuid, None)
        return RequestKey(self.uuid, self.request.segment, self.request.sample)


class RequestMaker(Protocol):
    """Makes requests from rows."""

    @property
    def columns(self) -> Mapping[str, tuple[str, ...]]:
        """Renamed columns: for a name such as ``uuid``, the columns of the row to read."""

    def __call__(self, row: Row) -> Request:
        """Make the request of a row; raise `RequestError` if the row cannot be used."""

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise `RequestError` if the rows lack a column that is needed."""


@dataclass(frozen=True)
class PlainRequests:
    """Makes requests from rows with the columns `FIELDS`, of which only ``segments`` is required.

    Attributes:
        columns: Renamed columns: for a name, the columns of the row to read.
        prefix: Replaces the prefix of every row.
        system: Replaces the system turn of every row.
        reads_weights: Whether to read the column ``weights``.
        reads_choices: Whether to read the columns ``choices``, which is required then, and
            ``answer``.
    """

    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefix: str | None = None
    reads_weights: bool = False
    system: str | None = None
    reads_choices: bool = False

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in FIELDS:
                raise OptionError(
                    f"no column {name!r} to be read from another; without a task there are "
                    f"{', '.join(FIELDS)}"
                )

    def __call__(self, row: Row) -> Request:
        """Make the request of a row.

        Raises:
            RequestError: If the row cannot be used.
        """
        columns = Columns(row.values, self.columns)
        if "segments" not in columns or columns["segments"] is None:
            keys = ", ".join(repr(key) for key in columns) or "none"
            raise MissingColumnError(
                f"the row has no 'segments', a list of strings; its columns: {keys}"
            )
        return Request(
            segments=columns.texts("segments"),
            prefix=columns.text("prefix") if self.prefix is None else self.prefix,
            suffix=columns.text("suffix"),
            answers=columns.answers(),
            uuid=columns.uuid(str(row.number)),
            weights=columns.weights(["segments"]) if self.reads_weights else (),
            system=columns.text("system") if self.system is None else self.system,
            messages=columns.messages(),
            answer_prefix=columns.text("answer_prefix"),
            choices=choices_of(columns) if self.reads_choices else (),
            answer=answer_of(columns) if self.reads_choices else None,
        )

    def check_columns(self, columns: Collection[str]) -> None:
        """Do nothing: rows without segments are refused one by one."""


def choices_of(columns: Columns) -> tuple[str, ...]:
    """Return the choices of a row.

    Raises:
        MissingColumnError: If there is no such column.
        RequestError: If they are no choices.
    """
    if "choices" not in columns or columns["choices"] is None:
        keys = ", ".join(repr(key) for key in columns) or "none"
        raise MissingColumnError(
            f"the row has no 'choices', a list of strings; its columns: {keys}"
        )
    choices = columns.choices()
    check_choices(choices)
    return choices


def answer_of(columns: Columns) -> int | None:
    """Return the index of a row's right choice; None if it names none.

    Raises:
        RequestError: If what it names is none of its choices.
    """
    answer = columns.answer()
    return None if answer is None else choice_index(answer, columns.choices())


@dataclass(frozen=True)
class RequestSource:
    """The requests of an input, one for each row; every iteration reads the input again.

    Attributes:
        rows: The input.
        make: Makes the request of a row.
        limit: Number of rows to read; None for all.
        num_segments: Number of segments to keep of each request; None for all.
        on_error: Effect of a bad row.
        fusion: The fusion that requests are checked for: it may need weights.
        judge: The judge that accepted answers are checked for.
        is_chat: Whether requests are put into a chat template; without one, requests with a
            system turn or messages are bad.
        part: The rows to read, if a shard is run; the limit is that of the whole input.
    """

    rows: Input
    make: RequestMaker = PlainRequests()
    limit: int | None = None
    num_segments: int | None = None
    on_error: OnError = "stop"
    fusion: Fusion = Fusion()
    judge: Judge | ChoiceJudge = Judge()
    is_chat: bool = True
    part: InputPart | None = None

    def __iter__(self) -> Iterator[Request | BadRow]:
        """Iterate from the beginning.

        Raises:
            RequestError: If there are no rows, or all are bad; at a bad row unless bad rows are
                skipped; if the input cannot be read; if no row has a column that the task reads.
                Of a shard, which may have no rows, only bad rows are refused: `survey` has
                checked the rest.
        """
        row_of: dict[str, int] = {} if self.part is None else dict(self.part.taken)
        first_bad = None
        has_good = False
        seen: set[str] = set()
        count = 0
        for row in self.limited_rows() if self.part is None else self._rows_of(self.part):
            count += 1
            if not row.error and not seen.issuperset(row.values):
                seen.update(row.values)
                if self.rows.has_fixed_columns:
                    self.make.check_columns(seen)
            try:
                request = self._request(row)
                if request.uuid in row_of:
                    raise RequestError(
                        f"uuid {request.uuid!r} is already used by row {row_of[request.uuid]}; "
                        "each row needs its own"
                    )
                has_good = True
            except RequestError as error:
                advice = self.rows.advice if isinstance(error, MissingColumnError) else ""
                message = f"{row.where}: {error}{advice}"
                if self.on_error == "stop":
                    raise RequestError(message) from None
                bad = BadRow(self._free_uuid(row, row_of), message)
                first_bad = first_bad or bad
                row_of[bad.uuid] = row.number
                yield bad
            else:
                row_of[request.uuid] = row.number
                yield request
        if self.part is not None:
            if count < len(self.part.rows):
                raise RequestError(f"{self.rows.name}: the input changed while it was read")
            return
        if not has_good:
            raise RequestError(
                f"no row can be used; the first: {first_bad.error}"
                if first_bad
                else f"{self.rows.name}: no rows in it"
            )
        if self.limit is None or count < self.limit:
            self.make.check_columns(seen)

    @property
    def shard(self) -> ShardRecord | None:
        """The shard that is read; None if it is the whole input."""
        return None if self.part is None else self.part.record

    def limited_rows(self) -> Iterator[Row]:
        """Iterate over the rows of the whole input, as many as ``limit`` allows."""
        return islice(self.rows, None if self.limit is None else min(self.limit, sys.maxsize))

    def uuid_of(self, row: Row) -> str:
        """Return the uuid of a row without making its request."""
        return self._own_uuid(row, str(row.number))

    def _rows_of(self, part: InputPart) -> Iterator[Row]:
        return islice(self.rows.rows_from(part.rows.start), len(part.rows))

    def _request(self, row: Row) -> Request:
        if row.error:
            raise RequestError(row.error)
        request = self.make(row)
        if self.num_segments is not None:
            request = request.with_segments(self.num_segments)
        self.fusion.check(request)
        try:
            self.judge.check_answers(request.answers)
        except JudgeError as error:
            raise RequestError(str(error)) from None
        if not self.is_chat and (request.system or request.messages):
            raise RequestError(
                "it has a system turn or messages, which need a chat template; pass "
                "`chat_template`"
            )
        turns = (request.system, *(message.content for message in request.messages))
        texts = (*turns, request.prefix, *request.segments, request.suffix, *request.choices)
        characters = sum(map(len, texts))
        if characters > MAX_CHARACTERS:
            raise RequestError(
                f"its prompt has {characters:,} characters, more than any model takes; shorten "
                f"it to {MAX_CHARACTERS:,}"
            )
        return replace(request, source=row.where)

    def _free_uuid(self, row: Row, taken: Container[str]) -> str:
        uuid = self._own_uuid(row, row.where)
        return row.where if uuid in taken else uuid

    def _own_uuid(self, row: Row, default: str) -> str:
        """Return the column ``uuid``, ``default`` if absent, or the row's place if unusable."""
        try:
            names = {name: it for name, it in self.make.columns.items() if name == "uuid"}
            uuid = Columns(row.values, names).uuid(default)
            uuid.encode()
        except (RequestError, UnicodeEncodeError):
            return row.where
        return uuid


def read_requests(
    source: str,
    *,
    num_segments: int | None = None,
    limit: int | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    with_choices: bool = False,
) -> list[Request]:
    """Read all requests of an input with a column ``segments``, a list of strings.

    The columns ``uuid``, ``prefix``, ``suffix`` and ``answers`` are optional, others are ignored,
    and null counts as absent. A missing ``uuid`` becomes the row number.

    Args:
        source: A file, folder or hub id (`flexmask.inputs.input_files.open_input`), or ``-`` for
            JSON Lines on standard input.
        num_segments: Number of segments to keep of each request; None for all.
        limit: Number of rows to read; None for all.
        delimiter: Character between the cells of CSV; None to detect it.
        encoding: Encoding of a text file; None for UTF-8.
        with_choices: Also read the columns ``choices`` and ``answer``, for `Engine.score`.

    Raises:
        OptionError: If the delimiter or the encoding is invalid.
        RequestError: If the input does not exist, or a row cannot be used; the message names the
            file, the line and what to do.
    """
    rows = open_input(source, TextFormat(delimiter, encoding))
    make = PlainRequests(reads_choices=with_choices)
    requests = RequestSource(rows, make, limit=limit, num_segments=num_segments)
    return [request for request in requests if isinstance(request, Request)]
