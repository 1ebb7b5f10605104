"""Measures the cost of each strategy and fusion on one file, with a model of random weights.

The answers are meaningless, but times and counts are those of trained weights
(``dataset_run.py``). Each way runs a batch to compile, and then the whole file.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from flexmask import Engine, Request
from flexmask.engine import RunStats
from flexmask.plugins.registry import load_registry
from flexmask.tasks.request_source import read_requests
from random_model import SHAPES, random_engine
from stamp import environment_stamp
from timed_run import FUSIONS, Way, timed_run


@dataclass(frozen=True)
class MethodCost:
    """Time and counts of one way for all requests.

    Attributes:
        way: Strategy, or fusion of prompts under `causal`.
        total_s: Seconds from the requests to the last generation.
        first_s: Seconds of the batch that compiled.
        stats: Counts of the engine.
    """

    way: str
    total_s: float
    first_s: float
    stats: RunStats

    def row(self) -> str:
        """Return a line of the table."""
        stats = self.stats
        return (
            f"{self.way:28} {self.total_s:7.2f} {stats.tokens_per_s:9,.0f} "
            f"{stats.prompt_tokens:11,} {stats.computed_tokens:11,} {stats.prefill_s:7.2f} "
            f"{stats.decode_s:7.2f} {stats.warm_compilations:3} {self.first_s:7.1f}"
        )


def measure(
    engine: Engine, requests: list[Request], way: str, max_new_tokens: int, batch_size: int | None
) -> MethodCost:
    """Run all requests one way, warm."""
    chosen = Way.named(way)
    run = partial(
        timed_run, engine, way=chosen, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    # The longest requests decide the cache size that the whole file needs.
    longest = sorted(requests, key=lambda r: -sum(map(len, r.segments)))
    first_s, _ = run(longest[:128])
    total_s, stats = run(requests)
    return MethodCost(way, total_s, first_s, stats)


def main() -> None:
    """Print a line for each way, then a JSON line."""
    strategies = [registered.cls.name for registered in load_registry().strategies()]
    ways = [*strategies, *map(str, FUSIONS)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requests", type=Path)
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways, metavar="WAY")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()

    requests = read_requests(str(arguments.requests))[: arguments.rows]
    engine = random_engine(arguments.shape, arguments.device, getattr(torch, arguments.dtype))
    print(
        f"{'':28} {'s':>7} {'tokens/s':>9} {'slots':>11} {'computed':>11} {'prefill':>7} "
        f"{'decode':>7} {'new':>3} {'first s':>7}"
    )
    costs = []
    for way in arguments.ways:
        cost = measure(engine, requests, way, arguments.max_new_tokens, arguments.batch_size)
        costs.append(cost)
        print(cost.row(), flush=True)
        engine.release()
        gc.collect()
    settings = {name: str(value) for name, value in vars(arguments).items()}
    record = {"ways": [asdict(cost) for cost in costs], "settings": settings}
    print(json.dumps(record | {"environment": environment_stamp()}))


if __name__ == "__main__":
    main()
