"""Merges the result files of all shards of an input into the file that one process would write.

Only schemas are read until the parts are known to belong together; then rows are copied some
thousands at a time, in the order of the shards, which is that of the input::

    part-1.feather ─┐
    part-2.feather ─┼─► out.feather.tmp ─► out.feather
    part-3.feather ─┘   4,096 rows at a time, atomic rename

The new file has the batches that one process writes: equal rows are equal bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from flexmask.errors import OutputError
from flexmask.record_differences import differences
from flexmask.results.formats import ROWS_PER_BATCH, StoredRows, open_rows, write_rows
from flexmask.results.journal import Journal, journal_path
from flexmask.results.output_path import writable_path
from flexmask.results.result_writer import ResultSummary
from flexmask.results.resume import EarlierRun, find_earlier, values
from flexmask.results.run_config import RunConfig
from flexmask.results.schema import RUN
from flexmask.tasks.shards import Shard, ShardRecord

_NAMED = 3


@dataclass(frozen=True)
class Part:
    """The complete result file of a shard.

    Attributes:
        path: The file.
        rows: Its rows.
        config: The configuration of its run.
        shard: Its shard.
        num_rows: The number of rows that it has to have.
    """

    path: Path
    rows: StoredRows
    config: RunConfig
    shard: ShardRecord
    num_rows: int

    @classmethod
    def open(cls, path: Path) -> Part:
        """Open the result file of a shard; its rows are not read yet.

        Raises:
            OutputError: If there is none, its run is not finished, or it is of no shard.
        """
        journal = journal_path(path)
        if not path.exists() and journal.exists():
            raise OutputError(
                f"{path}: its run is not finished, its rows so far are in {journal}; finish it "
                "with `resume`"
            )
        rows = open_rows(path)
        empty = rows.schema.empty_table()
        config = EarlierRun.of(path, empty).config
        if config.shard is None or config.num_rows is None:
            raise OutputError(f"{path}: the result of a whole input, not of a `shard`")
        return cls(path, rows, config, config.shard, config.num_rows)


def merge(paths: Sequence[Path], output: Path, *, is_replaced: bool = False) -> ResultSummary:
    """Merge the result files of all shards of an input.

    Args:
        paths: The files, in any order and of any format.
        output: The file to write; its extension selects the format.
        is_replaced: Whether to replace an existing output.

    Returns:
        Counts over the rows.

    Raises:
        OutputError: If shards are missing, given twice, not finished or of different runs or
            inputs; if a part is damaged or has lost rows; or if the output exists or cannot be
            written. The output is unchanged then.
    """
    parts = matching_parts([Part.open(path) for path in paths])
    target = writable_path(output)
    for part in parts:
        if target.exists() and os.path.samefile(part.path, target):
            raise OutputError(f"{output}: one of the parts; choose another `output`")
    journal = Journal.acquire(target)  # so that no other process writes there meanwhile
    is_written = False
    try:
        if target.exists() and not is_replaced:
            raise OutputError(
                f"{output}: exists; pass `overwrite` to replace it, or another `output`"
            )
        find_earlier(target, journal, "overwrite" if is_replaced else "new")
        summary = write_merged(parts, target)
        is_written = True
    finally:
        journal.close(keep=not is_written)
    return summary


def matching_parts(parts: Sequence[Part]) -> list[Part]:
    """Return the parts in the order of their shards.

    Raises:
        OutputError: If they are not all shards of one run over one input.
    """
    first = parts[0]
    for part in parts:
        _check_same_run(first, part)
    by_number: dict[int, Part] = {}
    for part in parts:
        other = by_number.setdefault(part.shard.number, part)
        if other is not part:
            raise OutputError(f"{part.path}: shard {part.shard.shard}, and so is {other.path}")
    count = first.shard.count
    if missing := [number for number in range(1, count + 1) if number not in by_number]:
        raise OutputError(
            f"{len(missing):,} of {count:,} shards are missing: {_named(missing, first.shard)}"
        )
    return [by_number[number] for number in range(1, count + 1)]


def _check_same_run(first: Part, part: Part) -> None:
    for what, old, new in (
        ("configuration", first.config.run, part.config.run),
        ("input", _of_input(first.shard), _of_input(part.shard)),
    ):
        if found := differences(old, new):
            raise OutputError(
                f"{part.path}: of another {what} than {first.path} ({'; '.join(found)})"
            )


def _of_input(shard: ShardRecord) -> dict[str, int | str]:
    return {
        "shards": shard.count,
        "input_rows": shard.input_rows,
        "input_digest": shard.input_digest,
    }


def _named(numbers: Sequence[int], of: ShardRecord) -> str:
    """Name shards with their rows."""
    shown = []
    for number in numbers[:_NAMED]:
        shard = Shard(number, of.count)
        rows = shard.rows(of.input_rows)
        span = f"rows {rows.start + 1:,} to {rows.stop:,}" if rows else "no rows"
        shown.append(f"{shard} ({span})")
    return ", ".join(shown) + (f" and {len(numbers) - _NAMED:,} more" if numbers[_NAMED:] else "")


def write_merged(parts: Sequence[Part], output: Path) -> ResultSummary:
    """Write the rows of parts, which `matching_parts` has put in order, to a new file.

    Raises:
        OutputError: If a part is damaged or has lost rows, or the file cannot be written.
    """
    config = replace(parts[0].config, shard=None, num_rows=None)
    for part in parts[1:]:
        config = config.merging(part.config)
    summary = ResultSummary(0, 0, 0, 0)

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal summary
        for part in parts:
            num_rows = 0
            for batch in part.rows:
                num_rows += batch.num_rows
                verdicts, reasons = values(batch, "correct"), values(batch, "finish_reason")
                summary = summary.plus(verdicts, reasons)
                yield batch
            if num_rows != part.num_rows:
                raise OutputError(
                    f"{part.path}: has {num_rows:,} rows, but its run wrote {part.num_rows:,}"
                )

    schema = parts[0].rows.schema.with_metadata({RUN: config.to_json()})
    write_rows(output, schema, _regrouped(counted()))
    return summary


def _regrouped(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield the rows of batches as tables of `ROWS_PER_BATCH` rows, the last one shorter."""
    held: list[pa.RecordBatch] = []
    num_held = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            taken = batch.slice(start, ROWS_PER_BATCH - num_held)
            start += taken.num_rows
            num_held += taken.num_rows
            held.append(taken)
            if num_held == ROWS_PER_BATCH:
                yield pa.Table.from_batches(held).combine_chunks()
                held, num_held = [], 0
    if held:
        yield pa.Table.from_batches(held).combine_chunks()
