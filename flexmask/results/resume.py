"""Resumes a run: finds the rows of an earlier run and the requests that remain."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa

from flexmask.errors import FlexMaskWarning, OutputError, RequestError
from flexmask.request import Request, RequestKey
from flexmask.results.formats import read_rows, sidecar_path
from flexmask.results.journal import Journal
from flexmask.results.run_config import RunConfig
from flexmask.results.schema import FAILED, NEVER_NULL, RUN, SCHEMAS, verdict
from flexmask.tasks.judge import ChoiceJudge, Judge
from flexmask.tasks.request_source import BadRow

OutputMode = Literal["new", "overwrite", "resume"]
"""``new``: the output must not exist. ``overwrite``: replace it once the new file is complete.
``resume``: keep the finished rows and add the others."""

START_AGAIN = "pass `overwrite` to start again, or another `output`"


@dataclass(frozen=True)
class EarlierRun:
    """The rows and the configuration of an earlier run, from its result file or its journal."""

    path: Path
    rows: pa.Table
    config: RunConfig

    @classmethod
    def of(cls, path: Path, rows: pa.Table) -> EarlierRun:
        """Check the rows read from ``path``.

        Raises:
            OutputError: If flexmask did not write them.
        """
        try:
            config = RunConfig.from_json((rows.schema.metadata or {})[RUN])
        except (KeyError, ValueError):
            raise OutputError(
                f"{path}: not a result file, no flexmask run is recorded in it"
            ) from None
        if not any(rows.schema.equals(schema) for schema in SCHEMAS.values()):
            raise OutputError(f"{path}: its columns are not those that this version writes")
        never_null = [name for name in NEVER_NULL if name in rows.schema.names]
        if name := next((name for name in never_null if _has_null(rows[name])), None):
            raise OutputError(f"{path}: damaged, its column {name!r} has nulls")
        return cls(path, rows, config)

    def check_same_run(self, config: RunConfig) -> None:
        """Check that the earlier run had the same configuration.

        Raises:
            OutputError: If it differs, with the differences, or was not recorded in full.
        """
        if missing := config.unrecorded(self.config):
            raise OutputError(
                f"{self.path}: cannot be verified to be of the same model and plugin, since an "
                "earlier version of flexmask wrote it and did not record "
                f"{' and '.join(missing)}; {START_AGAIN}"
            )
        if differences := config.differences(self.config):
            raise OutputError(
                f"{self.path}: made by a different run ({'; '.join(differences)}); {START_AGAIN}"
            )


def find_earlier(output: Path, journal: Journal, mode: OutputMode) -> EarlierRun | None:
    """Find the run to resume; a journal takes precedence, being newer than the result beside it.

    Raises:
        OutputError: If the output exists and ``mode`` does not allow it, or flexmask did not
            write it.
    """
    if mode == "overwrite":
        _check_sidecar(output, is_replaced=True)
        return None
    try:
        unfinished = journal.read()
        _check_sidecar(output, is_replaced=output.exists() or unfinished.rows.num_rows > 0)
        if mode == "resume" and unfinished.loss:
            warnings.warn(
                f"{journal.path}: {unfinished.loss}; the rows in them are generated again",
                FlexMaskWarning,
                stacklevel=2,
            )
        if mode == "resume" and unfinished.rows.num_rows:
            return EarlierRun.of(journal.path, unfinished.rows)
        if mode == "resume":
            return EarlierRun.of(output, read_rows(output).rows) if output.exists() else None
    except OutputError as error:
        raise OutputError(f"{error}; {START_AGAIN}") from None
    if unfinished.rows.num_rows or unfinished.tail == "damaged":
        raise OutputError(
            f"{journal.path}: holds {unfinished.rows.num_rows} finished rows of an interrupted "
            "run; pass `resume` to continue, `overwrite` to start again, or another `output`"
        )
    if output.exists():
        raise OutputError(
            f"{output}: exists; pass `resume` to add missing rows, `overwrite` to replace it, or "
            "another `output`"
        )
    return None


def _check_sidecar(output: Path, *, is_replaced: bool) -> None:
    """Refuse to overwrite a sidecar file that does not belong to this output.

    Args:
        output: The output.
        is_replaced: Whether an output of this name exists, whose sidecar may be replaced.

    Raises:
        OutputError: If the sidecar belongs to another program, or to another output.
    """
    path = sidecar_path(output)
    if output.suffix.lower() != ".jsonl" or not os.path.lexists(path):
        return
    try:
        RunConfig.from_json(path.read_bytes())
    except (OSError, ValueError):
        raise OutputError(
            f"{path}: flexmask would write the run configuration of {output.name} there, but the "
            "file belongs to another program; move it"
        ) from None
    if not is_replaced:
        raise OutputError(
            f"{path}: records the run of another file, since there is no {output.name}; move it"
        )


@dataclass(frozen=True)
class Plan:
    """The rows that a run keeps and those that it has to write.

    Attributes:
        has_row: By request key, in the order of the file: whether the row exists already.
        rows: The existing rows, with the current accepted answers.
        bad: Rows that nothing can be generated for.
        is_complete: Whether the existing result is what the run would write.
    """

    has_row: Mapping[RequestKey, bool]
    rows: pa.Table
    bad: Sequence[BadRow] = field(default=())
    is_complete: bool = False


def make_plan(
    requests: Iterable[Request | BadRow],
    earlier: EarlierRun | None,
    output: Path,
    judge: Judge | ChoiceJudge,
    schema: pa.Schema,
) -> Plan:
    """Compare the requests of a run with the rows of an earlier one.

    Failed rows of the earlier run are dropped, so that they are tried again.

    Raises:
        OutputError: If the earlier rows belong to other requests.
        RequestError: If two requests have the same uuid.
    """
    rows = schema.empty_table() if earlier is None else _without_failures(earlier.rows)
    hashes = dict(_hashes(rows))
    has_row: dict[RequestKey, bool] = {}
    bad, changed = [], list[RequestKey]()
    corrected: dict[RequestKey, Mapping[str, Any]] = {}
    for request in requests:
        if request.key in has_row:
            raise RequestError(
                f"uuid {request.uuid!r} is used by two requests; each needs its own"
            )
        found = hashes.pop(request.key, None)
        has_row[request.key] = found is not None
        if isinstance(request, BadRow):
            bad.append(request)
        elif found is not None:
            content, right = _content(request, schema), _right(request, schema)
            if found[0] != hash(content):
                changed.append(request.key)
            if found[1] != hash(tuple(right.values())):
                corrected[request.key] = right
    if earlier is not None:
        changed += [row.key for row in bad if has_row[row.key]]
        _check_same_requests(earlier.path, unknown=list(hashes), changed=changed)
    is_complete = (
        earlier is not None
        and earlier.path == output
        and not corrected
        and list(keys(earlier.rows)) == list(has_row)
        and all(has_row.values())
    )
    return Plan(has_row, _judged_again(rows, corrected, judge), bad, is_complete)


def values(rows: pa.Table | pa.RecordBatch, column: str) -> list[Any]:
    """Return a column as Python values."""
    return rows[column].to_pylist()


def keys(rows: pa.Table | pa.RecordBatch) -> Iterator[RequestKey]:
    """Yield the request key of each row."""
    uuids, segments = values(rows, "uuid"), values(rows, "segment")
    has_samples = "sample" in rows.schema.names
    samples = values(rows, "sample") if has_samples else [0] * rows.num_rows
    return map(RequestKey, uuids, segments, samples)


def _has_null(column: pa.ChunkedArray[Any]) -> bool:
    if column.null_count or not pa.types.is_list(column.type):
        return column.null_count > 0
    return any(cast(Any, chunk).flatten().null_count for chunk in column.chunks)


def _without_failures(rows: pa.Table) -> pa.Table:
    batches = []
    for batch in rows.to_batches():
        is_wanted = [reason != FAILED for reason in batch["finish_reason"].to_pylist()]
        batches.append(batch.filter(pa.array(is_wanted)) if not all(is_wanted) else batch)
    return pa.Table.from_batches(batches, rows.schema)


def _hashes(rows: pa.Table) -> Iterator[tuple[RequestKey, tuple[int, int]]]:
    """Yield for each key a hash of its prompt and one of its answers."""
    asked = [name for name in ASKED if name in rows.schema.names]
    right = [name for name in RIGHT if name in rows.schema.names]
    for batch in rows.to_batches():
        contents = zip(*(values(batch, name) for name in asked), strict=True)
        accepted = zip(*(values(batch, name) for name in right), strict=True)
        for key, content, answers in zip(keys(batch), contents, accepted, strict=True):
            yield key, (hash(_hashable(content)), hash(_hashable(answers)))


ASKED = (
    *("prefix", "paraphrases", "suffix", "weights", "system", "messages", "answer_prefix"),
    *("segment_turns", "choices"),
)
"""Columns that say what was asked; a resumed run must ask the same."""

RIGHT = ("answers", "answer")
"""Columns that say what is right; a resumed run may correct them."""


def _hashable(value: Any) -> Any:
    """Return the value of a column, or several, with tuples for lists and for structures."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return value
    return tuple(map(_hashable, value))


def _content(request: Request, schema: pa.Schema) -> tuple[object, ...]:
    turns = tuple((message.role, message.content) for message in request.messages)
    asked = (
        *(request.prefix, request.segments, request.suffix, request.weights or None),
        *(request.system, turns, request.answer_prefix, request.segment_turns),
    )
    return (*asked, request.choices) if "choices" in schema.names else asked


def _right(request: Request, schema: pa.Schema) -> Mapping[str, Any]:
    right = {"answers": request.answers, "answer": request.answer}
    return {name: value for name, value in right.items() if name in schema.names}


def _check_same_requests(
    path: Path, unknown: Sequence[RequestKey], changed: Sequence[RequestKey]
) -> None:
    if unknown:
        raise OutputError(
            f"{path}: has rows that the input has no request for ({_named(unknown)}); "
            f"{START_AGAIN}"
        )
    if changed:
        raise OutputError(
            f"{path}: the texts, weights or choices of requests have changed since "
            f"({_named(changed)}); {START_AGAIN}"
        )


def _judged_again(
    rows: pa.Table, corrected: Mapping[RequestKey, Mapping[str, Any]], judge: Judge | ChoiceJudge
) -> pa.Table:
    """Update the right answers of rows whose requests have other ones now, and judge again."""
    if not corrected:
        return rows
    batches = []
    for batch in rows.to_batches():
        content = batch.to_pylist()
        for key, row in zip(keys(batch), content, strict=True):
            if (right := corrected.get(key)) is not None:
                row |= right
                row |= verdict(row, judge)
        batches.append(pa.RecordBatch.from_pylist(content, schema=rows.schema))
    return pa.Table.from_batches(batches, rows.schema)


def _named(keys: Sequence[RequestKey]) -> str:
    first = ", ".join(
        repr(uuid)
        + (f" segment {segment}" if segment is not None else "")
        + (f" sample {sample}" if sample else "")
        for uuid, segment, sample in keys[:3]
    )
    return f"uuid {first}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
