"""Measures decode speed against the memory-bandwidth floor, beside ``transformers.generate``.

One model of random weights at the Llama-3.2-3B shape, its weights as they are or rounded to 8 bits
(``--quantize none int8 fp8``); prompts of equal length. The floor of a
step is the time to read all weights and the keys and values so far once, or to compute its
products, at the rates that this program measures (``flexmask.bench.floors``). Peers are
``model.generate`` with SDPA and FlexAttention, with dynamic and static cache; their time per step
is the difference between a long and a short generation.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flexmask.bench.floors import ModelCost, Rates
from flexmask.device import DTYPES_OF_8_BITS
from flexmask.engine import Engine
from flexmask.engine.decode_loop import DecodeLoop
from flexmask.engine.executor import BatchSize
from flexmask.engine.model_runner import bucketed_capacity
from flexmask.engine.run_options import RunOptions
from flexmask.plugins.registry import make_strategy
from random_model import DTYPES, SHAPES, random_engine, random_model
from random_prompts import RandomPrompts
from stamp import environment_stamp
from start_peer import generate

REPEATS = 3
AS_THEY_ARE = "none"
"""The name of weights that are not rounded."""

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdpa dynamic": ("sdpa", {"cache_implementation": "dynamic"}),
    "sdpa static": ("sdpa", {"cache_implementation": "static"}),
    "sdpa, whole sequence per token": ("sdpa", {"use_cache": False}),
    "eager dynamic": ("eager", {"cache_implementation": "dynamic"}),
    "flex_attention dynamic": ("flex_attention", {"cache_implementation": "dynamic"}),
    "flex_attention static": ("flex_attention", {"cache_implementation": "static"}),
}
"""Attention implementation and cache options of each peer."""


@dataclass(frozen=True)
class Decode:
    """Results for one way to decode.

    Attributes:
        way: The implementation that ran.
        batch_size: Number of rows.
        context: Slots before the first generated token.
        first_s: Seconds to the first token of a cold start, including compilation.
        prefill_ms: Median milliseconds of the prefill; None for transformers.
        ms_per_step: Median milliseconds per decode step.
        tokens_per_s: Tokens of all rows per second of decoding.
        floor_share: The floor as a share of `ms_per_step`.
        peak_gb: Peak device memory in 10⁹ bytes; 0 on a CPU.
    """

    way: str
    batch_size: int
    context: int
    first_s: float
    prefill_ms: float | None
    ms_per_step: float
    tokens_per_s: float
    floor_share: float
    peak_gb: float


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    """Time ``run`` including its work on the device; return seconds."""
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def reset_peak_memory() -> None:
    """Reset the GPU's peak memory counter."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def measured(
    way: str,
    batch_size: int,
    context: int,
    first_s: float,
    step_s: float,
    floor: float,
    prefill_s: float | None = None,
) -> Decode:
    """Make a record of the measurements and the peak memory since its last reset."""
    return Decode(
        way=way,
        batch_size=batch_size,
        context=context,
        first_s=first_s,
        prefill_ms=None if prefill_s is None else prefill_s * 1e3,
        ms_per_step=step_s * 1e3,
        tokens_per_s=batch_size / step_s,
        floor_share=floor / step_s,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0,
    )


def decode_flexmask(
    engine: Engine,
    strategy_name: str,
    batch_size: int,
    context: int,
    steps: int,
    floor: float,
    weights: str = AS_THEY_ARE,
) -> Decode:
    """Decode with the engine's runner."""
    strategy = make_strategy(strategy_name, {})
    runner, drawn = engine.runner, RandomPrompts(engine.tokenizer)
    layouts = [
        strategy.layout(drawn.tokenizer(drawn.request(strategy, context)))
        for _ in range(batch_size)
    ]
    reset_peak_memory()
    prompts = [layout.token_ids for layout in layouts]
    uuids = [str(row) for row in range(batch_size)]

    def prefill(loop: DecodeLoop) -> None:
        loop.load(range(batch_size), prompts, uuids)
        runner.prefill(runner.plan(dict(enumerate(layouts)), steps))

    def decode(loop: DecodeLoop) -> None:
        for _ in range(steps):
            loop.step()

    def start() -> DecodeLoop:
        size = BatchSize(batch_size, bucketed_capacity(context + steps), group=1)
        loop = engine.executor.prepare(strategy, size, endless(engine, steps))
        prefill(loop)
        loop.step()
        return loop

    def timed() -> tuple[float, float]:
        return seconds(lambda: prefill(loop)), seconds(lambda: decode(loop))

    synchronize()
    started = time.perf_counter()
    loop = start()
    synchronize()
    first_s = time.perf_counter() - started
    prefill_s, decode_s = map(
        statistics.median, zip(*(timed() for _ in range(REPEATS)), strict=True)
    )
    way = f"flexmask {strategy_name}" + ("" if weights == AS_THEY_ARE else f", {weights}")
    return measured(way, batch_size, context, first_s, decode_s / steps, floor, prefill_s)


def endless(engine: Engine, steps: int) -> RunOptions:
    """Return options under which no token ends a row."""
    return RunOptions(steps, replace(engine.generation_rules(), eos_token_ids=frozenset()))


def decode_peer(
    model: PreTrainedModel, way: str, batch_size: int, context: int, steps: int, floor: float
) -> Decode:
    """Decode with transformers' generate."""
    implementation, cache = PEERS[way]
    # Otherwise dynamo would first check the guards of graphs that another peer compiled.
    torch.compiler.reset()
    model.set_attn_implementation(implementation)
    prompt = torch.randint(5, model.config.vocab_size, (batch_size, context))
    prompt = prompt.to(model.device)
    reset_peak_memory()

    def generate_s(count: int) -> float:
        return seconds(lambda: generate(model, prompt, count, **cache))

    first_s = generate_s(2)
    generate_s(steps + 2)
    long_s = statistics.median(generate_s(steps + 2) for _ in range(REPEATS))
    short_s = statistics.median(generate_s(2) for _ in range(REPEATS))
    step_s = (long_s - short_s) / steps
    return measured(f"transformers {way}", batch_size, context, first_s, step_s, floor)


def print_row(result: Decode) -> None:
    """Print one result as a line of the table."""
    prefill = "" if result.prefill_ms is None else f"{result.prefill_ms:.1f}"
    print(
        f"{result.way:43} {result.batch_size:5} {result.context:7} {result.first_s:8.1f} "
        f"{prefill:>10} {result.ms_per_step:9.3f} {result.tokens_per_s:9.0f} "
        f"{result.floor_share:6.1%} {result.peak_gb:7.1f}",
        flush=True,
    )


def main() -> None:
    """Print a table, then a JSON line; ``--record`` writes it to a file after each result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--device", choices=tuple(DTYPES), default="cuda")
    parser.add_argument("--strategy", default="ensemble_isolation")
    parser.add_argument("--cases", nargs="*", default=["1x1024", "8x1024", "64x1024", "1x16384"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["sdpa static"])
    parser.add_argument("--peer-cases", nargs="*", default=["1x1024"])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument(
        "--quantize", nargs="+", choices=(AS_THEY_ARE, *DTYPES_OF_8_BITS), default=[AS_THEY_ARE]
    )
    parser.add_argument("--record", type=Path, help="file that receives the results so far")
    arguments = parser.parse_args()

    dtype = DTYPES[arguments.device]
    rates = Rates.measure(torch.device(arguments.device), dtype)
    print(rates)
    print(f"{'way':43} {'batch':>5} {'context':>7} {'first s':>8} {'prefill ms':>10} "
          f"{'ms/step':>9} {'tok/s':>9} {'floor':>6} {'GB':>7}")  # fmt: skip
    record = {"shape": arguments.shape, "rates": asdict(rates)}
    results: list[Decode] = []

    def line() -> str:
        rows = [asdict(result) for result in results]
        return json.dumps(record | {"results": rows, "environment": environment_stamp()})

    def note(result: Decode) -> None:
        results.append(result)
        print_row(result)
        if arguments.record is not None:
            arguments.record.write_text(line() + "\n")

    def sizes(case: str, model: PreTrainedModel) -> tuple[int, int, int, float]:
        """Return rows, context, steps and the floor of a step."""
        rows, context = map(int, case.split("x"))
        floor = ModelCost.of(model).decode_step_s(rows, rows * context, rows * context, rates)
        return rows, context, arguments.steps, floor

    for weights in arguments.quantize:
        quantize = None if weights == AS_THEY_ARE else weights
        engine = random_engine(arguments.shape, arguments.device, dtype, quantize)
        for case in arguments.cases:
            note(
                decode_flexmask(
                    engine, arguments.strategy, *sizes(case, engine.model), weights=weights
                )
            )
        del engine
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.peers:
        model = random_model(arguments.shape, arguments.device, dtype)
        for way in arguments.peers:
            for case in arguments.peer_cases:
                note(decode_peer(model, way, *sizes(case, model)))
    print(line())


if __name__ == "__main__":
    main()
