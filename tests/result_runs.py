"""Runs that write result files without a model: each request has one answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pytest

from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.results.result_writer import ResultSummary, ResultWriter, read_finished_rows
from flexmask.results.resume import OutputMode
from flexmask.results.run_config import RunConfig

CONFIG = RunConfig(
    run={"strategy": "causal", "parameters": {"window": 8}, "max_new_tokens": 10, "top_p": None},
    environment={"device": "cpu", "torch": "2.13.0"},
)


def make_requests(count: int) -> list[Request]:
    return [
        Request(
            uuid=f"q{number}",
            prefix="Réponds.\n\n",
            segments=(f"Q: {number}?\nA:", f"Q: what is {number}?\nA:"),
            suffix=" →" if number % 2 else "",
            answers=() if number % 3 == 2 else (str(number), f"the {number}"),
        )
        for number in range(count)
    ]


def answer(request: Request) -> Generation:
    """Always the same for a request; right where its number is even."""
    number = int(request.uuid[1:])
    text = f" The {number - number % 2}.\nQ: next"
    return Generation(request, text, tuple(range(number + 1)), "stop", 40 + number)


def run(
    output: Path,
    requests: Sequence[Request],
    mode: OutputMode = "new",
    config: RunConfig = CONFIG,
    stop_before: str | None = None,
) -> ResultSummary:
    """Generate what is left, one row a write; `stop_before` is a uuid to be interrupted at."""
    with ResultWriter.open(output, config=config, requests=requests, mode=mode) as writer:
        for request in writer.remaining:
            if request.uuid == stop_before:
                raise KeyboardInterrupt
            writer.write([answer(request)])
    return writer.summary


def interrupted_run(output: Path, requests: Sequence[Request], at: str, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(output, requests, stop_before=at, **options)


def expected_table(requests: Sequence[Request], tmp_path: Path) -> pa.Table:
    """What an undisturbed run writes."""
    output = tmp_path / "undisturbed.feather"
    run(output, requests, mode="overwrite")
    return pyarrow.feather.read_table(output)


def journal_of(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def uuids(path: Path) -> list[Any]:
    return read_finished_rows(path)["uuid"].to_pylist()
