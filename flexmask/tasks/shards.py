"""Shards: parts of an input that several processes run, each of consecutive rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from flexmask.errors import OptionError
from flexmask.limits import LARGEST_SIZE

_FORM = re.compile(r"([0-9]{1,10})/([0-9]{1,10})", re.ASCII)


@dataclass(frozen=True)
class Shard:
    """One of ``count`` parts of an input.

    The rows of a shard are consecutive, so that neighbours, which often share documents and
    beginnings, are computed by one process, and merging is concatenation. They follow from the
    numbers of rows and shards alone.

    Attributes:
        number: From 1.
        count: Number of shards.

    Raises:
        OptionError: If there is no such shard.

    Example:
        >>> [list(Shard(number, 3).rows(7)) for number in (1, 2, 3)]
        [[0, 1], [2, 3], [4, 5, 6]]
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count <= LARGEST_SIZE:
            raise OptionError(
                f"a shard is i/n with i from 1 to n, such as 3/8, got {self.number}/{self.count}"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a shard from a text such as ``3/8``.

        Raises:
            OptionError: If the text has another form, or there is no such shard.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise OptionError(f"a shard is i/n with i from 1 to n, such as 3/8, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        return f"{self.number}/{self.count}"

    def rows(self, num_rows: int) -> range:
        """Return the indices, from 0, of its rows in an input of ``num_rows`` rows."""
        bounds = (num_rows * number // self.count for number in (self.number - 1, self.number))
        return range(*bounds)


@dataclass(frozen=True)
class InputSurvey:
    """Facts about all rows of an input, which each shard needs; `survey` finds them.

    Attributes:
        num_rows: Number of rows.
        digest: A digest of their uuids in order: equal for the shards of one input.
        repeated: By uuid that several rows have, the index and the number of the first of them.
    """

    num_rows: int
    digest: str
    repeated: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def part(self, shard: Shard) -> InputPart:
        """Return the part of the input that a shard holds."""
        rows = shard.rows(self.num_rows)
        before = {
            uuid: number for uuid, (index, number) in self.repeated.items() if index < rows.start
        }
        record = ShardRecord(
            number=shard.number,
            count=shard.count,
            first_row=rows.start + 1,
            rows=len(rows),
            input_rows=self.num_rows,
            input_digest=self.digest,
        )
        return InputPart(rows, record, before)


@dataclass(frozen=True)
class ShardRecord:
    """A shard as recorded in its result file.

    Attributes:
        number: Number of the shard, from 1.
        count: Number of shards.
        first_row: Its first row in the input, from 1.
        rows: Number of its rows in the input.
        input_rows: Number of rows of the whole input.
        input_digest: A digest of the uuids of the whole input.
    """

    number: int
    count: int
    first_row: int
    rows: int
    input_rows: int
    input_digest: str

    @property
    def shard(self) -> Shard:
        """The shard."""
        return Shard(self.number, self.count)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Make it of the values that `to_json` returns.

        Raises:
            ValueError: If they are something else.
        """
        kinds = {name: int for name in cls.__dataclass_fields__} | {"input_digest": str}
        if values.keys() != kinds.keys() or any(
            type(values[name]) is not kind for name, kind in kinds.items()
        ):
            raise ValueError("not the record of a shard")
        record = cls(**values)
        try:
            rows = record.shard.rows(record.input_rows)
        except OptionError as error:
            raise ValueError(str(error)) from None
        if (record.first_row, record.rows) != (rows.start + 1, len(rows)):
            raise ValueError("not the rows of this shard")
        return record

    def to_json(self) -> dict[str, Any]:
        """Return its values by name."""
        return asdict(self)


@dataclass(frozen=True)
class InputPart:
    """The rows of an input that a shard holds.

    Attributes:
        rows: Their indices, from 0.
        record: The shard as it is recorded.
        taken: Uuids that rows before the part have and rows in it may repeat, with the number of
            the first row of each.
    """

    rows: range
    record: ShardRecord
    taken: Mapping[str, int] = field(default_factory=dict)
