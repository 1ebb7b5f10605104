"""Measures what it gives that rows come and go, with a model that ends its answers by itself.

Each prompt is run twice in turn: free rows get the next prompts when an eighth of them are free,
as always; and only when all are free, so that a batch waits for its longest answer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from flexmask import Engine, Fusion
from flexmask.engine import RunStats, scheduler
from flexmask.tasks.request_source import read_requests
from stamp import print_record

REPEATS = 3


@dataclass(frozen=True)
class Refilling:
    """Times of one way to fill rows.

    Attributes:
        refilled_part: Rows are refilled when one in this many is free; 1 waits for all.
        seconds: Seconds of each run, from the requests to the last generation.
        generated_tokens: Tokens of a run.
        tokens_per_s: Generated tokens per second, by the median run.
        row_utilization: Share of the rows of decode steps that computed a token of an answer.
        decode_steps: Decode steps of a run.
        prefills: Prefills of a run.
    """

    refilled_part: int
    seconds: tuple[float, ...]
    generated_tokens: int
    tokens_per_s: float
    row_utilization: float
    decode_steps: int
    prefills: int


def main() -> None:
    """Print a line for each way, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="hub id, folder or GGUF file")
    parser.add_argument("requests", type=Path, help="as benchmarks/myriadlama.py writes them")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=10)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--record", type=Path, help="file that receives the results")
    arguments = parser.parse_args()

    engine = Engine.from_pretrained(arguments.model, device=arguments.device)
    requests = read_requests(str(arguments.requests), limit=arguments.questions)
    runs: dict[int, list[tuple[float, RunStats]]] = {1: [], scheduler.REFILLED_PART: []}
    for repeat in range(REPEATS + 1):
        for part, found in runs.items():
            scheduler.REFILLED_PART = part
            started = time.perf_counter()
            run = engine.generate(
                requests,
                "causal",
                fusion=Fusion("none"),
                max_new_tokens=arguments.max_new_tokens,
                batch_size=arguments.batch_size,
                stop=["\n"],
            )
            for _ in run:
                pass
            if repeat:  # the first one compiles
                found.append((time.perf_counter() - started, run.stats))
    results = []
    for part, found in runs.items():
        seconds, stats = tuple(taken for taken, _ in found), found[-1][1]
        results.append(
            Refilling(
                part,
                seconds,
                stats.generated_tokens,
                stats.generated_tokens / statistics.median(seconds),
                stats.row_utilization,
                stats.decode_steps,
                stats.prefills,
            )
        )
        last = results[-1]
        print(
            f"refilled when 1/{part} of the rows are free: {last.tokens_per_s:7.1f} tokens/s, "
            f"{last.row_utilization:.0%} of rows in use, {last.decode_steps} steps, "
            f"{last.prefills} prefills"
        )
    print_record(arguments, {"results": [asdict(result) for result in results]})


if __name__ == "__main__":
    main()
