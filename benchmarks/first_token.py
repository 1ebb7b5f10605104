"""How long a process takes to its first token: with empty compile caches, and again.

A model of random weights is saved to a folder; then ``flexmask warmup`` loads it and runs one row
of 1,024 slots through prefill and one decoded token. The first process finds no compiled code,
Python's included, the second what the first left there.
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
from pathlib import Path

import torch
from dataset_run import SHAPES, random_engine
from stamp import environment_stamp

PROMPT_TOKENS = 1016


def process_s(model: Path, device: str, caches: Path) -> tuple[float, float]:
    """Seconds of a whole process, and of them from the loaded model to the first token."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "PYTHONPYCACHEPREFIX": str(caches / "bytecode"),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "flexmask_cli", "warmup", "--model", str(model)]
    command += ["--device", device, "--prompt-tokens", str(PROMPT_TOKENS)]
    command += ["--max-new-tokens", "1", "--batch-size", "1"]
    started = time.perf_counter()
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    total_s = time.perf_counter() - started
    first = re.search(r"^cold: .* in ([0-9.]+) s", result.stdout, re.MULTILINE)
    if first is None:
        raise RuntimeError(f"flexmask warmup printed {result.stdout!r}")
    return total_s, float(first[1])


def main() -> None:
    """Print both, then a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, caches = Path(folder) / "model", Path(folder) / "caches"
        dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
        engine = random_engine(arguments.shape, arguments.device, dtype)
        engine.model.save_pretrained(model)
        engine.tokenizer.save_pretrained(model)
        del engine
        record = {}
        for name in ("cold", "again"):
            total_s, after_loading_s = process_s(model, arguments.device, caches)
            record[name] = {"total_s": total_s, "after_loading_s": after_loading_s}
            print(f"{name:6} {total_s:6.1f} s, of it after loading {after_loading_s:6.1f} s")
    print(json.dumps(record | {"shape": arguments.shape, "environment": environment_stamp()}))


if __name__ == "__main__":
    main()
