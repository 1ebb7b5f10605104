"""``flexmask warmup``: what it compiles, a later process finds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command import run_command

COMMAND = [sys.executable, "-m", "flexmask_cli"]
COMPILED = {".so", ".cpp", ".cubin", ".ptx"}


def run(caches: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        **variables,
    }
    command = [*COMMAND, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def compiled_files(caches: Path) -> dict[Path, int]:
    """Files that compilers wrote, and when."""
    found = (path for path in caches.rglob("*") if path.suffix in COMPILED)
    return {path: path.stat().st_mtime_ns for path in found}


def test_what_it_compiled_a_run_of_its_size_finds_on_disk(tmp_path: Path, device: str) -> None:
    # Not as many rows as a short prompt has tiles: with torch before 2.13 on a CPU, equal sizes
    # share a symbol.
    sizes = ["--device", device, "--batch-size", "3", "--max-new-tokens", "4"]
    warmed = run(tmp_path, "warmup", "--prompt-tokens", "300", *sizes)
    assert warmed.returncode == 0, warmed.stderr
    cold, warm = warmed.stdout.splitlines()
    pattern = (
        r"(cold|warm): a batch of 3 rows in [0-9.]+ s, (\d+) graphs compiled or read from disk"
    )
    of_cold, of_warm = re.fullmatch(pattern, cold), re.fullmatch(pattern, warm)
    assert of_cold is not None
    assert of_warm is not None
    assert int(of_cold[2]) > 0
    assert int(of_warm[2]) == 0

    before = compiled_files(tmp_path)
    assert before
    lines = [
        {"uuid": str(row), "segments": [f"Q: Who plays {name}?\nA:", f"Q: {name} is by?\nA:"]}
        for row, name in enumerate(("the harp", "a reed pipe", "drums", "the lute"))
    ]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out.feather"
    generated = run(
        tmp_path, "generate", "--input", str(requests), "--output", str(output), "--quiet", *sizes
    )
    assert generated.returncode == 0, generated.stderr
    assert output.exists()
    after = compiled_files(tmp_path)
    added = sorted(path.name for path in after.keys() - before.keys())
    assert not added, f"compiled again: {', '.join(added)}"
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "5"], "5 segments do not fit into a prompt of 5 tokens"),
        (["--num-segments", "0"], "--num-segments must be a positive number, got '0'"),
        (["--batch-size", "0"], "batch"),
        (["--strategy", "nope"], "nope"),
        (["--device", "mps"], "device must be auto, cpu, cuda or cuda:N, got 'mps'"),
    ],
)
def test_impossible_sizes_are_named(arguments: list[str], message: str) -> None:
    assert message in run_command("warmup", "--device", "cpu", *arguments).error


def test_a_missing_compiler_is_named_before_anything_is_computed(tmp_path: Path) -> None:
    result = run(tmp_path, "warmup", "--device", "cpu", CXX=str(tmp_path / "no-compiler"))
    assert result.returncode == 1
    assert result.stderr.startswith("error: torch.compile finds no C++ compiler; install one")
    assert "Traceback" not in result.stderr
