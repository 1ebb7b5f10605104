"""Counts the greedy answers that stay the same if keys and values of documents are reused.

Requests are those of ``document_questions.py``, and the model is a real one. They run without a
cache, then twice with one: the first run fills it, the second finds all documents, most of them at
another position than the one that they were computed at. In float32 the answers are identical
(``tests/test_span_reuse.py``); in a narrower dtype rounding differs. Two runs without a cache, in
batches of different sizes, show by how much it does anyway.

Example:
    python benchmarks/document_questions.py myriadlama_1000.jsonl --questions 500 > all.jsonl
    python benchmarks/reuse_in_bfloat16.py SmolLM2-135M-Instruct.Q4_1.gguf all.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flexmask import Engine, Generation, read_requests
from flexmask.kv_store.options import KVCacheOptions
from flexmask.tasks.judge import Judge
from stamp import print_record

STRATEGY = "prefix_segment"
BATCH_SIZES = (64, 16)
CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class Agreement:
    """Answers of a run beside those of the first one, without a cache.

    Attributes:
        way: The run.
        same: Share of requests with the same tokens.
        same_first: Share with the same first token.
        right: Share whose answer is accepted.
        found_spans: Spans that the cache had.
        computed_tokens: Prompt tokens computed.
    """

    way: str
    same: float
    same_first: float
    right: float
    found_spans: int
    computed_tokens: int


def main() -> None:
    """Print a line for each run, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="hub id, folder or GGUF file")
    parser.add_argument("requests", type=Path, help="as document_questions.py writes them")
    parser.add_argument("--limit", type=int, help="number of requests; default: all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=10)
    parser.add_argument("--record", type=Path, help="file that receives the results")
    arguments = parser.parse_args()

    requests = read_requests(str(arguments.requests), limit=arguments.limit)
    source = {"device": arguments.device, "dtype": arguments.dtype}
    engine = Engine.from_pretrained(arguments.model, **source)
    large, small = BATCH_SIZES
    first: list[Generation] = []
    outcomes = []

    def compare(way: str, batch_size: int) -> None:
        run = engine.generate(
            requests,
            STRATEGY,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=batch_size,
            stop=["\n"],
        )
        generations = list(run)
        first.extend(generations if not first else ())
        found, computed = run.stats.cached_spans, run.stats.computed_tokens
        outcomes.append(Agreement(way, *agreement(first, generations), found, computed))
        last = outcomes[-1]
        print(
            f"{way:30}{last.same:8.1%} the same, {last.same_first:.1%} in the first token, "
            f"{last.right:.1%} right; {found} spans found, {computed:,} tokens computed"
        )

    compare("no cache", large)
    compare(f"no cache, batches of {small}", small)
    engine.close()
    on_gpu = engine.model.device.type == "cuda"
    cache = KVCacheOptions(gpu_bytes=CACHE_BYTES if on_gpu else 0, host_bytes=CACHE_BYTES)
    engine = Engine.from_pretrained(arguments.model, **source, kv_cache=cache)
    compare("empty cache", large)
    compare("all documents in the cache", large)
    engine.close()
    print_record(arguments, {"outcomes": [asdict(one) for one in outcomes]})


def agreement(
    first: Sequence[Generation], second: Sequence[Generation]
) -> tuple[float, float, float]:
    """Return the shares of equal tokens, of equal first tokens, and of accepted answers."""
    pairs = list(zip(first, second, strict=True))
    same = sum(one.token_ids == other.token_ids for one, other in pairs)
    same_first = sum(one.token_ids[:1] == other.token_ids[:1] for one, other in pairs)
    judge = Judge()
    right = sum(judge.score(judge.prediction(own), own.request.answers) for _, own in pairs)
    return same / len(pairs), same_first / len(pairs), right / len(pairs)


if __name__ == "__main__":
    main()
