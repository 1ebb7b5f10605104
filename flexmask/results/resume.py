"""What an earlier run left, and what is left to do for a run that goes on from it."""

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
from flexmask.results.schema import FAILED, NEVER_NULL, RUN, SCHEMA, verdict
from flexmask.tasks.judge import Judge
from flexmask.tasks.request_source import BadRow

OutputMode = Literal["new", "overwrite", "resume"]
"""``new``: nothing may stand there. ``overwrite``: replace it once the new file is complete.
``resume``: keep the finished rows and add the others."""

START_AGAIN = "pass --overwrite to start again, or another --output"


@dataclass(frozen=True)
class Earlier:
    """What an earlier run left, in its result or its journal."""

    path: Path
    rows: pa.Table
    config: RunConfig

    @classmethod
    def of(cls, path: Path, rows: pa.Table) -> Earlier:
        """Check what was read from ``path``.

        Raises:
            OutputError: If flexmask did not write it.
        """
        try:
            config = RunConfig.from_json((rows.schema.metadata or {})[RUN])
        except (KeyError, ValueError):
            raise OutputError(
                f"{path}: not a result file, no flexmask run is recorded in it"
            ) from None
        if not rows.schema.equals(SCHEMA):
            raise OutputError(f"{path}: its columns are not those that this version writes")
        if name := next((name for name in NEVER_NULL if _has_null(rows[name])), None):
            raise OutputError(f"{path}: damaged, its column {name!r} has empty places")
        return cls(path, rows, config)

    def check_same_run(self, config: RunConfig) -> None:
        """Refuse what another run made, or what does not say which.

        Raises:
            OutputError: With the differences.
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


def find_earlier(output: Path, journal: Journal, mode: OutputMode) -> Earlier | None:
    """What to resume; a journal comes first, for it was started after the result beside it.

    Raises:
        OutputError: If what is there stands in the way of ``mode``, or is not ours.
    """
    if mode == "overwrite":
        _check_sidecar(output, is_replaced=True)
        return None
    try:
        unfinished = journal.read()
        _check_sidecar(output, is_replaced=output.exists() or unfinished.rows.num_rows > 0)
        if mode == "resume" and unfinished.loss:
            warnings.warn(
                f"{journal.path}: {unfinished.loss}; what they held is generated again",
                FlexMaskWarning,
                stacklevel=2,
            )
        if mode == "resume" and unfinished.rows.num_rows:
            return Earlier.of(journal.path, unfinished.rows)
        if mode == "resume":
            return Earlier.of(output, read_rows(output).rows) if output.exists() else None
    except OutputError as error:
        raise OutputError(f"{error}; {START_AGAIN}") from None
    if unfinished.rows.num_rows or unfinished.tail == "damaged":
        raise OutputError(
            f"{journal.path}: holds {unfinished.rows.num_rows} finished rows of an interrupted "
            "run; pass --resume to go on, --overwrite to start again, or another --output"
        )
    if output.exists():
        raise OutputError(
            f"{output}: exists; pass --resume to add missing rows, --overwrite to replace it, or "
            "another --output"
        )
    return None


def _check_sidecar(output: Path, *, is_replaced: bool) -> None:
    """Refuse to write over a file that another program, or another output, has beside this one.

    Args:
        output: The output.
        is_replaced: Whether the run of an earlier output of this name may stand there.

    Raises:
        OutputError: If there is such a file.
    """
    path = sidecar_path(output)
    if output.suffix.lower() != ".jsonl" or not os.path.lexists(path):
        return
    try:
        RunConfig.from_json(path.read_bytes())
    except (OSError, ValueError):
        raise OutputError(
            f"{path}: what run makes {output.name} would be written there, and another file is "
            "there; move it"
        ) from None
    if not is_replaced:
        raise OutputError(
            f"{path}: records the run of another file, since there is no {output.name}; move it"
        )


@dataclass(frozen=True)
class Plan:
    """What a run will write.

    Attributes:
        has_row: By key, in the order of the file: whether the row stands already.
        rows: Those that do, with the answers of now.
        bad: Rows that nothing can be generated for.
        is_complete: Whether the result that stands there is what the run would make.
    """

    has_row: Mapping[RequestKey, bool]
    rows: pa.Table
    bad: Sequence[BadRow] = field(default=())
    is_complete: bool = False


def make_plan(
    requests: Iterable[Request | BadRow], earlier: Earlier | None, output: Path, judge: Judge
) -> Plan:
    """Compare all requests of a run with the rows of an earlier one.

    Rows that failed are left out of the earlier ones, to be tried again.

    Raises:
        OutputError: If the earlier rows are those of other requests.
        RequestError: If two requests have the same uuid.
    """
    rows = SCHEMA.empty_table() if earlier is None else _without_failures(earlier.rows)
    hashes = dict(_hashes(rows))
    has_row: dict[RequestKey, bool] = {}
    bad, changed, corrected = [], [], {}
    for request in requests:
        if request.key in has_row:
            raise RequestError(
                f"uuid {request.uuid!r} is given to two requests; a row needs one of its own"
            )
        found = hashes.pop(request.key, None)
        has_row[request.key] = found is not None
        if isinstance(request, BadRow):
            bad.append(request)
        elif found is not None:
            if found[0] != hash(_content(request)):
                changed.append(request.key)
            if found[1] != hash(request.answers):
                corrected[request.key] = request.answers
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
    """A column as Python values."""
    return rows[column].to_pylist()


def keys(rows: pa.Table | pa.RecordBatch) -> Iterator[RequestKey]:
    """The key of the request of each row."""
    return zip(values(rows, "uuid"), values(rows, "segment"), strict=True)


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
    """For each key a hash of what was asked, and one of its answers."""
    asked = ["prefix", "paraphrases", "suffix", "weights"]
    for batch in rows.to_batches():
        columns = batch.select([*asked, "answers"]).to_pydict().values()
        for key, (prefix, segments, suffix, weights, answers) in zip(
            keys(batch), zip(*columns, strict=True), strict=True
        ):
            content = (prefix, tuple(segments), suffix, tuple(weights or ()))
            yield key, (hash(content), hash(tuple(answers)))


def _content(request: Request) -> tuple[object, ...]:
    return request.prefix, request.segments, request.suffix, request.weights


def _check_same_requests(
    path: Path, unknown: Sequence[RequestKey], changed: Sequence[RequestKey]
) -> None:
    if unknown:
        raise OutputError(
            f"{path}: it has rows that the input has no request for "
            f"({_named(unknown)}); {START_AGAIN}"
        )
    if changed:
        raise OutputError(
            f"{path}: requests have another prefix, suffix, segments or weights since "
            f"({_named(changed)}); {START_AGAIN}"
        )


def _judged_again(
    rows: pa.Table, corrected: Mapping[RequestKey, tuple[str, ...]], judge: Judge
) -> pa.Table:
    """The rows with the answers of now, which may have changed since they were written."""
    if not corrected:
        return rows
    batches = []
    for batch in rows.to_batches():
        content = batch.to_pylist()
        for row in content:
            if (answers := corrected.get((row["uuid"], row["segment"]))) is not None:
                row["answers"] = answers
                row |= verdict(row["prediction"], answers, judge)
        batches.append(pa.RecordBatch.from_pylist(content, schema=SCHEMA))
    return pa.Table.from_batches(batches, SCHEMA)


def _named(keys: Sequence[RequestKey]) -> str:
    first = ", ".join(
        repr(uuid) if segment is None else f"{uuid!r} segment {segment}"
        for uuid, segment in keys[:3]
    )
    return f"uuid {first}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
