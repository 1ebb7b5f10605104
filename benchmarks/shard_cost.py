"""Measures what shards cost beside the model: the survey of the input, and merging.

Makes an input of as many rows as asked, as JSON Lines and as Parquet, surveys both, reads the
last shard of each, and merges parts of answered rows. Each step runs in a process of its own, so
that its peak of resident memory is its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet

from flexmask.generation import Generation
from flexmask.inputs.input_files import open_input
from flexmask.request import Request
from flexmask.results.formats import write_rows
from flexmask.results.merge import merge
from flexmask.results.run_config import RunConfig
from flexmask.results.schema import RUN, SCHEMA, row_of
from flexmask.tasks.input_survey import survey
from flexmask.tasks.judge import Judge
from flexmask.tasks.request_source import RequestSource
from flexmask.tasks.shards import InputSurvey, Shard
from stamp import environment_stamp

BATCH = 4096
SEGMENT = "Q: In which town was person number {} born, and what is its name today?"


def rows_of(start: int, stop: int) -> list[dict[str, object]]:
    """Return rows of five paraphrases, some 400 characters each."""
    return [
        {"uuid": f"row-{n}", "segments": [SEGMENT.format(n)] * 5, "suffix": "\nA:"}
        for n in range(start, stop)
    ]


def write_inputs(folder: Path, rows: int) -> None:
    """Write the input in both formats."""
    batches = [(start, min(start + BATCH, rows)) for start in range(0, rows, BATCH)]
    schema = pa.Table.from_pylist(rows_of(0, 1)).schema
    with (
        (folder / "rows.jsonl").open("w") as lines,
        pyarrow.parquet.ParquetWriter(folder / "rows.parquet", schema) as parquet,
    ):
        for start, stop in batches:
            some = rows_of(start, stop)
            lines.writelines(json.dumps(row) + "\n" for row in some)
            parquet.write_table(pa.Table.from_pylist(some, schema))


def write_parts(folder: Path, rows: int, shards: int) -> None:
    """Write the result file of each shard, with an answer of 20 tokens in each row."""
    for number in range(1, shards + 1):
        part = InputSurvey(rows, "0" * 16).part(Shard(number, shards))
        config = RunConfig({"strategy": "causal"}, shard=part.record, num_rows=len(part.rows))
        schema = SCHEMA.with_metadata({RUN: config.to_json()})

        def tables(indices: range = part.rows) -> Iterator[pa.Table]:
            for start in range(indices.start, indices.stop, BATCH):
                answered = []
                for row in rows_of(start, min(start + BATCH, indices.stop)):
                    request = Request(**row)  # type: ignore[arg-type]
                    answer = Generation(request, " a town. " * 8, (1,) * 20, "length", 120)
                    answered.append(row_of(answer, Judge()))
                yield pa.Table.from_pylist(answered, schema=SCHEMA)

        write_rows(folder / f"{number}.feather", schema, tables())


def survey_file(path: Path) -> None:
    """Survey an input."""
    survey(RequestSource(open_input(str(path))))


def read_last_shard(path: Path, rows: int, shards: int) -> None:
    """Read the requests of the last shard, which skips all rows before it."""
    part = InputSurvey(rows, "0" * 16).part(Shard(shards, shards))
    for _ in islice(replace(RequestSource(open_input(str(path))), part=part), len(part.rows)):
        pass


def merge_parts(folder: Path, shards: int) -> None:
    """Merge the parts."""
    parts = [folder / f"{number}.feather" for number in range(1, shards + 1)]
    merge(parts, folder / "merged.feather")


def timed(step: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds of a step, and by how many megabytes memory rose above its start."""
    before = resident_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from now on VmHWM is the peak of this step
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    return seconds, (resident_kb("VmHWM") - before) / 1e3


def resident_kb(name: str) -> int:
    """Return an entry of Linux's status of this process, in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1])


def main() -> None:
    """Print a line for each step, then a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=1000)
    arguments = parser.parse_args()
    rows, shards = arguments.rows, arguments.shards
    figures: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, rows)
        write_parts(folder, rows, shards)
        steps: dict[str, Callable[[], None]] = {"merge": partial(merge_parts, folder, shards)}
        for path in (folder / "rows.jsonl", folder / "rows.parquet"):
            steps[f"survey {path.name}"] = partial(survey_file, path)
            steps[f"last shard of {path.name}"] = partial(read_last_shard, path, rows, shards)
        for what, step in steps.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                seconds, megabytes = pool.submit(timed, step).result()
            figures[what] = {"seconds": seconds, "rows_per_s": rows / seconds, "mb": megabytes}
            print(f"{what:28}{seconds:9.1f} s{rows / seconds:14,.0f} rows/s{megabytes:9.0f} MB")
        sizes = {path.name: path.stat().st_size / rows for path in folder.glob("rows.*")}
        sizes["merged.feather"] = (folder / "merged.feather").stat().st_size / rows
    for name, size in sizes.items():
        print(f"{name:28}{size:9.0f} bytes per row")
    record = {"rows": rows, "shards": shards, "figures": figures, "bytes_per_row": sizes}
    print(json.dumps(record | {"environment": environment_stamp()}))


if __name__ == "__main__":
    main()
