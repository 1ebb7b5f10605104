"""Measures a whole file of requests through a model of random weights, beside its peers.

Random weights at a real shape cost as much as trained ones; the answers are meaningless. The
bundled tokenizer replaces the model's own; it splits real text into more tokens.

The third run computes the shared beginning of the prompts in every row. Some of the rows run in
other ways too (``dataset_peers.py``).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dataset_peers import rerun_rows_per_s, separate_rows_per_s
from flexmask.engine import Engine
from flexmask.plugins.registry import make_strategy
from flexmask.request import Request
from flexmask.results.result_writer import ResultWriter
from flexmask.results.run_config import RunConfig
from flexmask.strategy import Strategy
from flexmask.tasks.request_source import read_requests
from random_model import SHAPES, random_engine
from stamp import environment_stamp


def timed_run(
    engine: Engine,
    requests: list[Request],
    strategy: Strategy,
    arguments: argparse.Namespace,
    config: RunConfig,
) -> dict[str, Any]:
    """Run the whole data set, from requests to the result file; return times and counts."""
    started = time.perf_counter()
    run = engine.generate(
        requests,
        strategy,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
    )
    with ResultWriter.open(
        arguments.output, config=config, requests=requests, mode="overwrite"
    ) as writer:
        for generations in run.batches():
            writer.write(generations)
    total_s = time.perf_counter() - started
    stats = asdict(run.stats)
    model_s = stats["prefill_s"] + stats["decode_s"]
    return {
        "total_s": total_s,
        "rows_per_s": stats["generations"] / total_s,
        "tokens_per_s": stats["generated_tokens"] / total_s,
        "prefill_share": stats["prefill_s"] / total_s,
        "decode_share": stats["decode_s"] / total_s,
        "host_share": 1 - model_s / total_s,
    } | stats


def peers_rows_per_s(
    engine: Engine, requests: list[Request], strategy: Strategy, arguments: argparse.Namespace
) -> dict[str, float]:
    """Run some of the rows in other ways; return rows per second."""
    count = arguments.max_new_tokens
    rows = requests[: arguments.separate_rows]
    peers = {
        f"generate, each paraphrase, batch {size}": separate_rows_per_s(engine, rows, count, size)
        for size in arguments.separate_batches
    }
    if rows := requests[: arguments.rerun_rows]:
        peers["whole sequence per token"] = rerun_rows_per_s(engine, strategy, rows, count)
    return peers


def main() -> None:
    """Print the summary of the run, then a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requests", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--strategy", default="ensemble_isolation")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--rerun-rows", type=int, default=20, help="rows recomputed for every token"
    )
    parser.add_argument("--separate-rows", type=int, default=128, help="rows for generate")
    parser.add_argument("--separate-batches", type=int, nargs="*", default=[64, 128, 256])
    arguments = parser.parse_args()

    settings = {name: str(value) for name, value in vars(arguments).items()}
    requests = read_requests(str(arguments.requests))[: arguments.rows]
    engine = random_engine(arguments.shape, arguments.device, getattr(torch, arguments.dtype))
    strategy = make_strategy(arguments.strategy, {})
    config = RunConfig(settings, environment_stamp())

    inputs = (engine, requests, strategy, arguments)
    runs = {way: timed_run(*inputs, config) for way in ("cold", "warm")}
    with patch.object(engine.runner, "cache_prefix", return_value=False):
        runs["prefix in every row"] = timed_run(*inputs, config)
    print(" " * 20, *(f"{way:>20}" for way in runs))
    for name in runs["cold"]:
        print(f"{name:20}", *(f"{run[name]:20.2f}" for run in runs.values()))
    engine.release()
    own, peers = runs["warm"]["rows_per_s"], peers_rows_per_s(*inputs)
    for name, rows_per_s in peers.items():
        print(
            f"{name:40} {rows_per_s:9.2f} rows/s, flexmask {own / rows_per_s:7.1f} times as many"
        )
    record = {"runs": runs, "peers_rows_per_s": peers, "settings": settings}
    print(json.dumps(record | {"environment": environment_stamp()}))


if __name__ == "__main__":
    main()
