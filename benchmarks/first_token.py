"""Measures the time of a process to its first token, with empty and with filled compile caches.

A model of random weights is saved to a folder; then ``flexmask warmup`` loads it and runs one row
of 1,024 slots through prefill and one decoded token. The first process finds neither compiled code
nor Python bytecode, which an installer would have written; the second finds bytecode only, and
later ones also the caches of the second. Peers are processes of transformers' generate with a
static cache (``start_peer.py``), and a process that only imports the modules they all import.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from random_model import DTYPES, SHAPES, random_engine
from stamp import environment_stamp

PROMPT_TOKENS = 1016
PEER = str(Path(__file__).with_name("start_peer.py"))
PEERS = {
    "transformers sdpa static": "sdpa",
    "transformers flex_attention static": "flex_attention",
}
"""Attention implementation of each peer."""
IMPORTS = "imports alone"


@dataclass(frozen=True)
class Start:
    """Times of one process.

    Attributes:
        way: The program that ran.
        caches: Caches that it found: ``nothing``, Python's bytecode (``cold``), or compiled code
            as well (``again``).
        first_token_s: Seconds to its first token.
        after_loading_s: The part of these seconds after the model was loaded.
        total_s: Seconds to its end.
        loop_s: Seconds of a reference loop in Python just before, as the machine's speed varies.
    """

    way: str
    caches: str
    first_token_s: float
    after_loading_s: float
    total_s: float
    loop_s: float


@dataclass(frozen=True)
class Processes:
    """Processes that load one model.

    Attributes:
        model: Folder of the model.
        device: Device to run on.
        caches: Folder of all caches.
    """

    model: Path
    device: str
    caches: Path

    def starts(self, peers: Sequence[str], repeats: int) -> Iterator[Start]:
        """Time flexmask without any cache, then each way cold, then all ways alternately."""
        yield self._start("flexmask", "nothing", self.caches / "other")
        ways = ["flexmask", *peers]
        # Without spaces, because inductor cannot compile for a CPU in paths with spaces.
        compiled = {way: self.caches / way.replace(" ", "-") for way in (IMPORTS, *ways)}
        for way in ways:
            yield self._start(way, "cold", compiled[way])
        for _ in range(repeats):
            for way in compiled:
                yield self._start(way, "again", compiled[way])

    def _start(self, way: str, caches: str, compiled: Path) -> Start:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
            "TRITON_CACHE_DIR": str(compiled / "triton"),
            "PYTHONPYCACHEPREFIX": str(self.caches / "bytecode"),
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        loop_s = time_loop()
        command, started = self._command(way), time.perf_counter()
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            first_token_s = time.perf_counter() - started
            process.stdout.read()
        total_s = time.perf_counter() - started
        after_loading = re.match(r"(?:cold: .*|done) in ([0-9.]+) s", line)
        if after_loading is None or process.returncode:
            raise RuntimeError(f"{way} ended with {process.returncode} after {line!r}")
        return Start(way, caches, first_token_s, float(after_loading[1]), total_s, loop_s)

    def _command(self, way: str) -> list[str]:
        if way == IMPORTS:
            return [sys.executable, PEER, "--imports"]
        sizes = ["--model", str(self.model), "--device", self.device]
        sizes += ["--prompt-tokens", str(PROMPT_TOKENS)]
        if way in PEERS:
            return [sys.executable, PEER, *sizes, "--attention", PEERS[way]]
        command = [sys.executable, "-m", "flexmask_cli", "warmup", *sizes]
        return [*command, "--max-new-tokens", "1", "--batch-size", "1"]


def time_loop() -> float:
    """Time a reference loop in Python; return seconds."""
    started = time.perf_counter()
    total = 0
    for number in range(3_000_000):
        total += number & 7
    return time.perf_counter() - started


def save_model(shape: str, device: str, folder: Path) -> None:
    """Save a model of random weights, and the bundled tokenizer."""
    engine = random_engine(shape, device, DTYPES[device])
    engine.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)


def print_medians(starts: Sequence[Start]) -> None:
    """Print the median times of processes that found compiled code."""
    for way in dict.fromkeys(start.way for start in starts if start.caches == "again"):
        times = [s.first_token_s for s in starts if (s.way, s.caches) == (way, "again")]
        print(f"{way:36} again, median of {len(times)}: {statistics.median(times):6.1f} s")


def main() -> None:
    """Print a line for each process, then a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="file that receives the results so far")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3, help="processes after the first")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        # In a separate process, so that only the timed process holds a CUDA context.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(save_model, arguments.shape, arguments.device, model).result()
            environment = pool.submit(environment_stamp).result()
        record = {"shape": arguments.shape, "environment": environment}
        processes = Processes(model, arguments.device, Path(folder) / "caches")
        starts: list[Start] = []
        for start in processes.starts(arguments.peers, arguments.repeats):
            starts.append(start)
            print(
                f"{start.way:36} {start.caches:7} {start.first_token_s:6.1f} s to the first "
                f"token, {start.after_loading_s:5.1f} of them after loading; "
                f"ended after {start.total_s:5.1f}; loop {start.loop_s:.2f}",
                flush=True,
            )
            line = json.dumps({"starts": [asdict(each) for each in starts]} | record)
            if arguments.record is not None:
                arguments.record.write_text(line + "\n")
    print_medians(starts)
    print(line)


if __name__ == "__main__":
    main()
