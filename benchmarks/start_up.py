"""Measures the start of the command line: ``--help``, the first run of the demo, and the next.

The first run starts with empty compile caches; later runs use the caches it has filled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

from stamp import environment_stamp

COMMAND = [sys.executable, "-m", "flexmask_cli"]


@dataclass(frozen=True)
class StartUp:
    """Wall time of whole processes in seconds."""

    help_s: float
    cold_demo_s: float
    warm_demo_s: float
    rows: int


def seconds(arguments: list[str], environment: dict[str, str]) -> float:
    """Run a command and return its wall time in seconds."""
    started = time.perf_counter()
    subprocess.run([*COMMAND, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(rows: int, repeats: int) -> StartUp:
    """Measure all commands, with caches and output in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        demo = ["generate", "--limit", str(rows), "--stop", "\\n", "--overwrite"]
        demo += ["--output", f"{folder}/demo.feather"]
        return StartUp(
            help_s=statistics.median(seconds(["--help"], environment) for _ in range(repeats)),
            cold_demo_s=seconds(demo, environment),
            warm_demo_s=statistics.median(seconds(demo, environment) for _ in range(repeats)),
            rows=rows,
        )


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200, help="questions that the demo answers")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    result = measure(arguments.rows, arguments.repeats)
    print(f"flexmask --help            {result.help_s:7.2f} s")
    print(f"demo, empty caches         {result.cold_demo_s:7.2f} s")
    print(f"demo again                 {result.warm_demo_s:7.2f} s")
    print(json.dumps(asdict(result) | {"environment": environment_stamp()}))


if __name__ == "__main__":
    main()
