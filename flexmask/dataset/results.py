"""Result files: Feather, written through a journal that survives a crash, resumed row by row.

While a run goes on, its finished rows stand in ``<output>.partial``, the journal: an Arrow IPC
stream, appended to and synced at each write, and locked by the process that writes it. A clean
end puts the rows in input order, moves the Feather file in place and removes the journal::

    write ─► out.feather.partial ─► out.feather.tmp ─► out.feather
             append, sync           sync               atomic rename

So ``out.feather`` is always a whole file, and the journal holds every finished row of an
interrupted run. It stands for itself: a resumed run copies the rows that it starts from into a
new journal, which replaces the old one atomically.

Example::

    config = RunConfig(run={"strategy": "causal", "seed": 0}, environment={"device": "cuda"})
    with ResultWriter.open("out.feather", config=config, requests=requests) as writer:
        for generation in engine.generate(writer.remaining):
            writer.write([generation])
    print(writer.summary.accuracy)
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import pyarrow as pa

from flexmask.dataset.journal import Journal, read_rows, write_rows
from flexmask.dataset.judge import is_exact_match
from flexmask.dataset.run_config import RunConfig
from flexmask.errors import OutputError, RequestError
from flexmask.generation import Generation
from flexmask.request import Request

OutputMode = Literal["new", "overwrite", "resume"]
"""``new``: nothing may stand there. ``overwrite``: replace it once the new file is complete.
``resume``: keep the finished rows and add the others."""

SCHEMA = pa.schema(
    [
        ("uuid", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("paraphrases", pa.list_(pa.string())),
        ("prediction", pa.string()),
        ("generation", pa.string()),
        ("prefix", pa.string()),
        ("suffix", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("generated_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("correct", pa.bool_()),
    ]
)
"""Columns of a result file: ``paraphrases`` holds the segments, ``correct`` is null where a
request has no answers. The run stands in the metadata, under the key ``flexmask``, as JSON."""

_RUN = b"flexmask"
_EXTENSIONS = (".feather", ".arrow")
_INPUT_EXTENSIONS = (".jsonl", ".ndjson", ".json")
_ROWS_PER_BATCH = 4096
_START_AGAIN = "pass --overwrite to start again, or another --output"


@dataclass(frozen=True)
class ResultSummary:
    """Counts over the rows of a result file.

    Attributes:
        rows: Finished rows, those of earlier runs included.
        resumed: Rows that stood there when the writer was opened.
        judged: Rows whose request has answers.
        correct: Rows whose prediction is one of them.
    """

    rows: int
    resumed: int
    judged: int
    correct: int

    @property
    def accuracy(self) -> float | None:
        """Share of judged rows that are correct; None where there are none."""
        return self.correct / self.judged if self.judged else None

    def plus(self, verdicts: Collection[bool | None]) -> ResultSummary:
        """The counts with more rows, given by their values of ``correct``."""
        return replace(
            self,
            rows=self.rows + len(verdicts),
            judged=self.judged + sum(verdict is not None for verdict in verdicts),
            correct=self.correct + sum(verdict is True for verdict in verdicts),
        )


class ResultWriter:
    """Writes the rows of one run; a context manager.

    Leaving it without an exception makes the Feather file. An exception, Ctrl-C included, leaves
    the journal with the finished rows.

    Attributes:
        remaining: The requests that had no row when the writer was opened, in input order. Where
            there are none, nothing needs to be generated.
        summary: Counts over the rows so far.
    """

    def __init__(
        self,
        output: Path,
        journal: Journal,
        schema: pa.Schema,
        requests: Sequence[Request],
        rows: pa.Table,
        *,
        is_complete: bool,
    ) -> None:
        """Take over what `open` has locked and checked."""
        finished = set(_values(rows, "uuid"))
        self.remaining = tuple(request for request in requests if request.uuid not in finished)
        self.summary = ResultSummary(0, rows.num_rows, 0, 0).plus(_values(rows, "correct"))
        self._output = output
        self._journal = journal
        self._schema = schema
        self._requests = requests
        self._pending = {request.uuid for request in self.remaining}
        self._is_complete = is_complete

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        config: RunConfig,
        requests: Sequence[Request],
        mode: OutputMode = "new",
    ) -> Self:
        """Lock the output, and find what is left to do.

        Args:
            path: The Feather file to make; missing folders are created.
            config: Recorded in the file; a resumed run must have the same ``run``.
            requests: All requests of the run, finished or not, in the order of the file.
            mode: What to do where a result or a journal stands.

        Raises:
            OutputError: If the output cannot be written, is written by another process, or
                stands in the way of ``mode``; or if the run cannot be resumed.
            RequestError: If two requests have the same uuid.
        """
        output = Path(path)
        _check_uuids(requests)
        _check_place(output)
        journal = Journal.acquire(output)
        try:
            earlier = _find_earlier(output, journal, mode)
            if earlier is None:
                rows, is_complete = SCHEMA.empty_table(), False
            else:
                earlier.check_same_run(config)
                earlier.check_same_requests(requests)
                config = config.resuming(earlier.config)
                rows = _judged_by(requests, earlier.rows)
                is_complete = earlier.path == output and _is_result_of(requests, earlier.rows)
            schema = SCHEMA.with_metadata({_RUN: config.to_json()})
            if not is_complete:
                journal.restart(schema, rows)
            return cls(output, journal, schema, requests, rows, is_complete=is_complete)
        except BaseException:
            journal.close()
            raise

    def write(self, generations: Iterable[Generation]) -> None:
        """Append rows, in any order; once this returns, they survive a crash.

        Raises:
            OutputError: If the disk is full or fails; the rows of earlier calls are safe.
            ValueError: If a row was not asked for, or is already there.
        """
        rows = [_row(generation) for generation in generations]
        uuids = [row["uuid"] for row in rows]
        if len(set(uuids)) < len(uuids) or not self._pending.issuperset(uuids):
            raise ValueError(f"every remaining request takes one row, got uuids {uuids}")
        if rows:
            self._journal.append(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
            self._pending.difference_update(uuids)
            self.summary = self.summary.plus([row["correct"] for row in rows])

    def __enter__(self) -> Self:
        """Nothing is left to do: `open` has locked the output."""
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Make the file after a clean end; after an exception, keep the journal.

        Raises:
            OutputError: If rows are missing after a clean end, or the file cannot be written.
        """
        is_needed = not self._is_complete and self.summary.rows > 0
        try:
            if exception_type is None and not self._is_complete:
                self._finish()
                is_needed = False
        finally:
            self._journal.close(keep=is_needed)

    def _finish(self) -> None:
        if self._pending:
            raise OutputError(
                f"{self._output}: {len(self._pending)} of {len(self._requests)} requests have no "
                "row yet; pass --resume to generate them"
            )
        rows = read_rows(self._journal.path)
        write_rows(self._output, self._schema, _in_order(rows, self._requests))


def check_output(path: str | Path, mode: OutputMode) -> None:
    """Find out whether a run could write its result, before anything costly.

    Missing folders are created, and a file is really written in the output's.

    Raises:
        OutputError: If the output cannot be written, is written by another process, or stands in
            the way of ``mode``; the message says what to do.
    """
    output = Path(path)
    _check_place(output)
    journal = Journal.acquire(output)
    try:
        _find_earlier(output, journal, mode)
    finally:
        journal.close()


def read_finished_rows(path: str | Path) -> pa.Table:
    """Read a result file, or the journal of a run that was interrupted or still goes on.

    Of a journal that ends within a write, the rows before that write are read.

    Returns:
        A table with the columns of `SCHEMA` and the run in its metadata (`read_run_config`).

    Raises:
        OutputError: If there is no such file, or it is not a result file.
    """
    path = Path(path)
    return _Earlier.of(path, read_rows(path)).rows


def read_run_config(path: str | Path) -> RunConfig:
    """Read what run made a result file, or a journal.

    Raises:
        OutputError: If there is no such file, or it is not a result file.
    """
    path = Path(path)
    return _Earlier.of(path, read_rows(path)).config


def default_output_path(
    input_name: str, model: str, strategy: str, num_segments: int | None
) -> Path:
    """Where a result goes when no place is given, relative to the working folder.

    Example:
        >>> str(default_output_path("data/webqa.jsonl", "org/Model-3B", "causal", 5))
        'outputs/webqa/Model-3B/causal-5.feather'
    """
    source = "stdin" if input_name == "-" else Path(input_name).name
    for extension in _INPUT_EXTENSIONS:
        source = source.removesuffix(extension)
    count = "all" if num_segments is None else num_segments
    name = f"{_path_safe(strategy)}-{count}.feather"
    return Path("outputs", _path_safe(source), _path_safe(Path(model).name), name)


def _path_safe(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).lstrip(".") or "_"


@dataclass(frozen=True)
class _Earlier:
    """What an earlier run left, in its result or its journal."""

    path: Path
    rows: pa.Table
    config: RunConfig

    @classmethod
    def of(cls, path: Path, rows: pa.Table) -> _Earlier:
        try:
            config = RunConfig.from_json((rows.schema.metadata or {})[_RUN])
        except (KeyError, ValueError):
            raise OutputError(
                f"{path}: not a result file, no flexmask run is recorded in it; {_START_AGAIN}"
            ) from None
        if not rows.schema.equals(SCHEMA):
            raise OutputError(
                f"{path}: its columns are not those that this version writes; {_START_AGAIN}"
            )
        return cls(path, rows, config)

    def check_same_run(self, config: RunConfig) -> None:
        if differences := config.differences(self.config):
            raise OutputError(
                f"{self.path}: made by a different run ({'; '.join(differences)}); {_START_AGAIN}"
            )

    def check_same_requests(self, requests: Sequence[Request]) -> None:
        request_of = {request.uuid: request for request in requests}
        unknown, changed = [], []
        for batch in self.rows.select(["uuid", "prefix", "paraphrases", "suffix"]).to_batches():
            for uuid, *content in zip(*batch.to_pydict().values(), strict=True):
                request = request_of.pop(uuid, None)
                if request is None:
                    unknown.append(uuid)
                elif content != [request.prefix, list(request.segments), request.suffix]:
                    changed.append(uuid)
        if unknown:
            raise OutputError(
                f"{self.path}: it has rows that the input has no request for "
                f"({_named(unknown)}); {_START_AGAIN}"
            )
        if changed:
            raise OutputError(
                f"{self.path}: requests have another prefix, suffix or segments since "
                f"({_named(changed)}); {_START_AGAIN}"
            )


def _find_earlier(output: Path, journal: Journal, mode: OutputMode) -> _Earlier | None:
    """What to resume; a journal comes first, for it was started after the result beside it."""
    if mode == "overwrite":
        return None
    unfinished = read_rows(journal.path)
    if unfinished.num_rows:
        earlier = _Earlier.of(journal.path, unfinished)
        if mode == "resume":
            return earlier
        raise OutputError(
            f"{journal.path}: holds {unfinished.num_rows} finished rows of an interrupted run; "
            "pass --resume to go on, --overwrite to start again, or another --output"
        )
    if not output.exists():
        return None
    if mode == "resume":
        return _Earlier.of(output, read_rows(output))
    raise OutputError(
        f"{output}: exists; pass --resume to add missing rows, --overwrite to replace it, or "
        "another --output"
    )


def _check_place(output: Path) -> None:
    if os.path.isdir(output):  # unlike Path.is_dir, quiet about folders that may not be read
        raise OutputError(f"{output}: a folder; name a file in it: {output / 'results.feather'}")
    if output.suffix.lower() not in _EXTENSIONS:
        raise OutputError(
            f"{output}: unknown extension {output.suffix!r}; name it {' or '.join(_EXTENSIONS)}"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent, buffering=0) as trial:
            trial.write(b"flexmask")
    except OSError as error:
        raise OutputError(
            f"{output.parent}: nothing can be written there ({error.strerror}); choose another "
            "place with --output"
        ) from None


def _check_uuids(requests: Sequence[Request]) -> None:
    seen = set()
    for request in requests:
        if request.uuid in seen:
            raise RequestError(
                f"uuid {request.uuid!r} is given to two requests; a row needs one of its own"
            )
        seen.add(request.uuid)


def _row(generation: Generation) -> dict[str, Any]:
    request = generation.request
    return {
        "uuid": request.uuid,
        "answers": request.answers,
        "paraphrases": request.segments,
        "prediction": generation.prediction,
        "generation": generation.text,
        "prefix": request.prefix,
        "suffix": request.suffix,
        "prompt_tokens": generation.prompt_tokens,
        "generated_tokens": len(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "correct": _verdict(generation.prediction, request.answers),
    }


def _verdict(prediction: str, answers: Collection[str]) -> bool | None:
    return is_exact_match(prediction, answers) if answers else None


def _judged_by(requests: Sequence[Request], rows: pa.Table) -> pa.Table:
    """The rows with the answers of now, which may have changed since they were written."""
    answers_of = {request.uuid: list(request.answers) for request in requests}
    answers = [answers_of[uuid] for uuid in _values(rows, "uuid")]
    if answers == _values(rows, "answers"):
        return rows
    verdicts = list(map(_verdict, _values(rows, "prediction"), answers))
    for name, values in (("answers", answers), ("correct", verdicts)):
        column = SCHEMA.field(name)
        values_of_now = pa.array(values, column.type)
        rows = rows.set_column(SCHEMA.get_field_index(name), column, values_of_now)
    return rows


def _is_result_of(requests: Sequence[Request], rows: pa.Table) -> bool:
    found = zip(_values(rows, "uuid"), _values(rows, "answers"), strict=True)
    return list(found) == [(request.uuid, list(request.answers)) for request in requests]


def _values(rows: pa.Table, column: str) -> list[Any]:
    return rows[column].to_pylist()


def _in_order(rows: pa.Table, requests: Sequence[Request]) -> Iterator[pa.Table]:
    """The rows in the order of the requests, a batch at a time.

    Sliced, not taken: `Table.take` fails on columns of more than 2 GiB of text.
    """
    index_of = {uuid: index for index, uuid in enumerate(_values(rows, "uuid"))}
    rows = rows.combine_chunks()
    for start in range(0, len(requests), _ROWS_PER_BATCH):
        some = requests[start : start + _ROWS_PER_BATCH]
        runs = _runs([index_of[request.uuid] for request in some])
        yield pa.concat_tables([rows.slice(*run) for run in runs]).combine_chunks()


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and length of each run of consecutive indices."""
    start = 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1:
            yield indices[start], end - start
            start = end


def _named(uuids: Sequence[str]) -> str:
    first = ", ".join(map(repr, uuids[:3]))
    return f"uuid {first}" + (f" and {len(uuids) - 3} more" if len(uuids) > 3 else "")
