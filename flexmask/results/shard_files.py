"""The folder of the shards of a run whose workers are several processes.

Beside the output stands a folder with a part for each shard, the journals of those that are being
written, and the rows that workers have started::

    out.feather.shards/
        shards.json            the number of shards, and the survey of the input
        1.feather              a finished shard
        2.feather.partial      the journal of another
        2.feather.started      the rows of it that a worker has started: those without a row in
                               the journal were in flight if the worker was killed
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmask.errors import OutputError
from flexmask.record_differences import differences
from flexmask.request import RequestKey
from flexmask.results.journal import journal_path
from flexmask.results.result_writer import read_finished_rows
from flexmask.results.resume import START_AGAIN, OutputMode, keys
from flexmask.results.whole_file import os_errors, replacing
from flexmask.tasks.shards import InputPart, InputSurvey, Shard

_PLAN = "shards.json"


@dataclass(frozen=True)
class ShardFolder:
    """The folder of the shards of one output.

    Attributes:
        path: ``<output>.shards``.
        count: Number of shards.
        survey: The survey of the input.
    """

    path: Path
    count: int
    survey: InputSurvey

    @classmethod
    def open(
        cls,
        output: Path,
        mode: OutputMode,
        survey: InputSurvey,
        choose_count: Callable[[int], int],
    ) -> ShardFolder:
        """Create the folder of an output, or find that of a run to be resumed.

        Args:
            output: The result file.
            mode: What to do if there is a folder already.
            survey: The survey of the input.
            choose_count: Returns the number of shards of a new run, for a number of rows.

        Raises:
            OutputError: If the folder exists and ``mode`` does not allow it, belongs to another
                input, or cannot be written.
        """
        path = shard_folder(output)
        recorded = {"rows": survey.num_rows, "digest": survey.digest}
        with os_errors(path, "cannot be used ({})"):
            earlier = _read_plan(path)
            if earlier is not None and mode == "resume":
                if found := differences(earlier["input"], recorded):
                    raise OutputError(
                        f"{path}: shards of another input ({'; '.join(found)}); {START_AGAIN}"
                    )
                return cls(path, earlier["count"], survey)
            if earlier is not None and mode == "new":
                raise OutputError(
                    f"{path}: holds the shards of an interrupted run; pass `resume` to continue, "
                    "`overwrite` to start again, or another `output`"
                )
            if earlier is not None:
                shutil.rmtree(path)
            path.mkdir()
            count = choose_count(survey.num_rows)
            with replacing(path / _PLAN) as file:
                file.write(json.dumps({"count": count, "input": recorded}).encode())
        return cls(path, count, survey)

    def part(self, number: int) -> InputPart:
        """Return the rows of a shard."""
        return self.survey.part(Shard(number, self.count))

    def file(self, number: int) -> Path:
        """Return the path of the result file of a shard."""
        return self.path / f"{number}.feather"

    def files(self) -> list[Path]:
        """Return the paths of the result files of all shards, in order."""
        return [self.file(number) for number in range(1, self.count + 1)]

    def finished(self) -> list[int]:
        """Return the numbers of the shards that have a result file."""
        names = {entry.name for entry in os.scandir(self.path)}
        return [n for n in range(1, self.count + 1) if self.file(n).name in names]

    def remove(self) -> None:
        """Remove the folder with all parts."""
        with os_errors(self.path, "cannot be removed ({})"):
            shutil.rmtree(self.path)


def shard_folder(output: Path) -> Path:
    """Return the path of the folder of an output's shards."""
    return output.with_name(output.name + ".shards")


def _read_plan(folder: Path) -> dict[str, Any] | None:
    """Return the recorded plan of a folder; None if there is no folder.

    Raises:
        OutputError: If the folder is something else.
    """
    if not os.path.lexists(folder):
        return None
    if not os.listdir(folder):  # its run was killed before it could say anything
        folder.rmdir()
        return None
    try:
        plan = json.loads((folder / _PLAN).read_bytes())
        if type(plan["count"]) is int and isinstance(plan["input"], dict):
            return dict(plan)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise OutputError(f"{folder}: not a folder of shards; move it, or choose another `output`")


class StartedRows:
    """The rows of a shard that this process has started, in a file beside the part.

    Entries survive the death of the process, not a crash of the machine: nothing is synced.
    """

    def __init__(self, part: Path) -> None:
        """Begin the file of a part, without rows."""
        self._path = _started_path(part)
        self._file = self._path.open("w", encoding="utf-8")
        self.clear()

    def add(self, key: RequestKey) -> None:
        """Add a row that is about to be started."""
        self._file.write(json.dumps(key) + "\n")
        self._file.flush()

    def clear(self) -> None:
        """Forget all rows."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        self._file.flush()

    def close(self, *, is_orderly: bool = True) -> None:
        """Close the file; remove it if nothing failed, so that no row is in flight."""
        self._file.close()
        if is_orderly:
            self._path.unlink(missing_ok=True)


def rows_in_flight(part: Path) -> list[RequestKey]:
    """Return the rows of a part that a worker had started and not finished when it was killed."""
    try:
        with _started_path(part).open(encoding="utf-8") as file:
            started = list(_keys_of(file))
    except FileNotFoundError:
        return []
    finished = _finished_keys(part) if started else set()
    return [key for key in started if key not in finished]


def worker_of(part: Path) -> dict[str, Any] | None:
    """Return host and process id of the worker that has a part open; None if none has."""
    try:
        with _started_path(part).open(encoding="utf-8") as file:
            return dict(json.loads(file.readline()))
    except (FileNotFoundError, ValueError):
        return None


def _keys_of(lines: Iterable[str]) -> Iterator[RequestKey]:
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the last one, cut
            return
        if isinstance(entry, list):
            yield RequestKey(*entry)


def _finished_keys(part: Path) -> set[RequestKey]:
    found: set[RequestKey] = set()
    for path in (part, journal_path(part)):
        if path.exists() and path.stat().st_size:
            found.update(keys(read_finished_rows(path)))
    return found


def _started_path(part: Path) -> Path:
    return part.with_name(f"{part.stem}.started")
