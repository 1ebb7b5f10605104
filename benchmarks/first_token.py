"""How long a process takes to its first token: with empty compile caches, and again.

A model of random weights is saved to a folder; then ``flexmask warmup`` loads it and runs one row
of 1,024 slots through prefill and one decoded token. The first process finds no compiled code at
all, Python's bytecode included, which an installer would have left there; the second finds the
bytecode, and the others what the second left.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from dataset_run import SHAPES, random_engine
from stamp import environment_stamp

PROMPT_TOKENS = 1016


@dataclass(frozen=True)
class Start:
    """How long a process took."""

    first_token_s: float
    """To its first token."""
    after_loading_s: float
    """Of that, from the loaded model on."""
    total_s: float
    """To its end."""


def start(model: Path, device: str, bytecode: Path, compiled: Path) -> Start:
    """Time a process of ``flexmask warmup`` with the caches that it finds."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
        "PYTHONPYCACHEPREFIX": str(bytecode),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "flexmask_cli", "warmup", "--model", str(model)]
    command += ["--device", device, "--prompt-tokens", str(PROMPT_TOKENS)]
    command += ["--max-new-tokens", "1", "--batch-size", "1"]
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        first_token_s = time.perf_counter() - started
        process.stdout.read()
    total_s = time.perf_counter() - started
    first = re.match(r"cold: .* in ([0-9.]+) s", line)
    if first is None or process.returncode:
        raise RuntimeError(f"flexmask warmup ended with {process.returncode} after {line!r}")
    return Start(first_token_s, float(first[1]), total_s)


def save_model(shape: str, device: str, folder: Path) -> None:
    """Save a model of random weights, and the bundled tokenizer."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    engine = random_engine(shape, device, dtype)
    engine.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)


def main() -> None:
    """Print each, then a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3, help="processes after the first")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, bytecode = Path(folder) / "model", Path(folder) / "bytecode"
        # In a process of its own, so that none but the one that is timed holds the GPU.
        saving = get_context("spawn").Process(
            target=save_model, args=(arguments.shape, arguments.device, model)
        )
        saving.start()
        saving.join()
        if saving.exitcode:
            raise RuntimeError(f"the model could not be saved: exit code {saving.exitcode}")
        starts: dict[str, list[Start]] = {"nothing": [], "cold": [], "again": []}
        rounds = [("nothing", "other"), ("cold", "compiled")]
        rounds += [("again", "compiled")] * arguments.repeats
        for name, compiled in rounds:
            one = start(model, arguments.device, bytecode, Path(folder) / compiled)
            starts[name].append(one)
            print(
                f"{name:7} {one.first_token_s:6.1f} s to the first token, "
                f"{one.after_loading_s:5.1f} of them after loading; "
                f"ended after {one.total_s:5.1f}",
                flush=True,
            )
    record = {name: [asdict(one) for one in them] for name, them in starts.items()}
    print(json.dumps(record | {"shape": arguments.shape, "environment": environment_stamp()}))


if __name__ == "__main__":
    main()
