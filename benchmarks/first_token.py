"""How long a process takes to its first token: with empty compile caches, and again.

A model of random weights is saved to a folder; then processes of their own load it, run one row of
1,024 slots through prefill and one decoded token, and stop. The first finds no compiled code,
Python's included, the second what the first left there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from dataset_run import SHAPES, random_engine
from stamp import environment_stamp

PROMPT_TOKENS = 1016

RUN = """
import sys, time
from flexmask import Engine, make_strategy
engine = Engine.from_pretrained(sys.argv[1], device=sys.argv[2])
loaded = time.perf_counter()
stats = engine.warm_up(
    make_strategy("ensemble_isolation", {}),
    prompt_tokens=int(sys.argv[3]), max_new_tokens=1, batch_size=1,
)
print(time.perf_counter() - loaded)
"""


def process_s(model: Path, device: str, caches: Path) -> tuple[float, float]:
    """Seconds of a whole process, and of them after the model was loaded."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "PYTHONPYCACHEPREFIX": str(caches / "bytecode"),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", RUN, str(model), device, str(PROMPT_TOKENS)]
    started = time.perf_counter()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, float(result.stdout.split()[-1])


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
