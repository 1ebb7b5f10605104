"""The record of a benchmark run, with its hardware, versions and commit."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexmask.bench.machine import machine_stamp


def environment_stamp() -> dict[str, str | int | None]:
    """Return machine, versions and commit, for the JSON line of a result."""
    return machine_stamp() | {"commit": _commit()}


def print_record(arguments: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Print arguments, results and environment as a line of JSON.

    Args:
        arguments: The arguments of the run. If they name a file ``record``, it gets the line too.
        results: JSON values, by name.
    """
    settings = dict(vars(arguments))
    file: Path | None = settings.pop("record", None)
    record = {"settings": {name: str(value) for name, value in settings.items()}, **results}
    line = json.dumps(record | {"environment": environment_stamp()})
    print(line)
    if file is not None:
        file.write_text(line + "\n")


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
