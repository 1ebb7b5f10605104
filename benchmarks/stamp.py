"""Hardware, versions and commit of a benchmark run."""

from __future__ import annotations

import subprocess
from pathlib import Path

from flexmask.bench.machine import machine_stamp


def environment_stamp() -> dict[str, str | int | None]:
    """Return machine, versions and commit, for the JSON line of a result."""
    return machine_stamp() | {"commit": _commit()}


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
