r"""Measures a data set of documents that recur, with and without a cache of keys and values.

Requests are those of ``document_questions.py``. Each way runs the first ``--limit`` of them with
one engine, and then the first token of single requests, each of other documents. ``full`` ways
find all documents in the cache: on the GPU, in host memory (the tier on the GPU holds one
document) or in a folder. A cache of half of the corpus shows evictions; there host memory holds
the other half.

If there are more requests than that, the last way runs all of them with a cache of half of the
corpus and nothing beside it. The share of documents found is printed beside the one that their
popularity predicts (``cache_prediction.py``), and the memory in use after each tenth.

With ``--vllm-site``, vLLM runs the same prompts before, in a process of its own, with its prefix
cache, which is empty at first and before each single request.

Examples:
    python benchmarks/document_questions.py myriadlama_1000.jsonl --questions 10000 > all.jsonl
    python benchmarks/document_reuse.py --requests all.jsonl --vllm-site /opt/vllm --record r.json
    python benchmarks/document_reuse.py --requests all.jsonl --shape tiny --device cpu \
        --limit 6 --batch-size 2 --ways "no cache" "empty cache"

    First tokens of single prompts alone, in a minute or two:
    python benchmarks/document_reuse.py --requests all.jsonl --limit 12 --batch-size 1 \
        --max-new-tokens 1 --record document-reuse-first-token-h200.json \
        --ways "no cache" "full, on the GPU" "full, in host memory" "full, in a folder"
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch

from cache_prediction import predicted_hit_rate
from document_peer import measure_vllm
from document_questions import EXPONENT
from flexmask import Engine, Request, read_requests
from flexmask.engine import RunStats
from flexmask.engine.engine import LOOKAHEAD_BATCHES
from flexmask.kv_store.counters import TierCounters
from flexmask.kv_store.options import KVCacheOptions
from random_model import SHAPES, random_engine
from stamp import environment_stamp

STRATEGY = "parallel_context"
MODEL_FILES = {"weights": "random, seed 0"}
SETTINGS = ("shape", "device", "limit", "batch_size", "max_new_tokens", "ways")
"""Arguments that results depend on; the others are paths."""
SINGLE = 12
"""Requests whose first token is measured."""
TENTHS = 10
COLUMNS = (
    f"{'seconds':>9}{'prefill':>9}{'decode':>9}{'first ms':>10}{'computed':>11}{'copied':>11}"
    f"{'hits':>7}{'kept':>7}{'evicted':>9}"
)


@dataclass(frozen=True)
class Way:
    """A way to run.

    Attributes:
        name: Its name in the table.
        options: Where keys and values are kept; None for nowhere.
        is_filled: Whether the cache has all documents before.
        takes_all: Whether it runs all requests, beyond the limit.
    """

    name: str
    options: KVCacheOptions | None
    is_filled: bool = False
    takes_all: bool = False


@dataclass(frozen=True)
class Outcome:
    """Figures of a way.

    Attributes:
        name: Name of the way.
        total_s: Seconds for all requests, from texts to texts.
        prefill_s: Seconds of it in prefill, on the device.
        decode_s: Seconds of it in decode, on the device.
        first_token_ms: Median milliseconds to the first token of one request; of each the one
            before it had other documents.
        computed_tokens: Prompt tokens computed.
        copied_tokens: Prompt tokens copied or shared.
        cached_spans: Spans found in the cache.
        kept_spans: Spans computed and put into it.
        evictions: Spans that left the tier on the device.
        hit_rate: Share of the spans asked for that the tier on the device had; each is asked for
            once for the prompts that start together, the prefix too. None without a cache.
        predicted_hit_rate: The share that the popularity of documents predicts; None where it was
            not asked for.
        memory: Bytes of tensors on the GPU, and of the process on the host, after each tenth of
            the requests.
    """

    name: str
    total_s: float
    prefill_s: float
    decode_s: float
    first_token_ms: float
    computed_tokens: int
    copied_tokens: int
    cached_spans: int
    kept_spans: int
    evictions: int
    hit_rate: float | None
    predicted_hit_rate: float | None
    memory: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Corpus:
    """The documents of the requests.

    Attributes:
        texts: The documents, the most popular first.
        num_tokens: Tokens of each.
        num_bytes: Bytes of the keys and values of each.
    """

    texts: tuple[str, ...]
    num_tokens: tuple[int, ...]
    num_bytes: tuple[int, ...]

    @classmethod
    def of(cls, engine: Engine, requests: Sequence[Request]) -> Self:
        """Collect the documents; titles number them by popularity (``document_questions.py``)."""
        texts = tuple(sorted({segment for request in requests for segment in request.segments}))
        tokens = tuple(len(ids) for ids in engine.tokenizer(list(texts))["input_ids"])
        return cls(texts, tokens, tuple(span_bytes(engine, count) for count in tokens))


def span_bytes(engine: Engine, num_tokens: int) -> int:
    """Return the bytes of keys and values of some tokens."""
    return engine.runner.cache.bytes_per_row(num_tokens)


def ways(engine: Engine, corpus_bytes: int, folder: Path) -> Iterator[Way]:
    """Yield the ways to measure, for a corpus of so many bytes."""
    roomy = corpus_bytes * 5 // 4
    document = span_bytes(engine, 600)
    on_gpu = engine.model.device.type == "cuda"

    def memory(num_bytes: int) -> KVCacheOptions:
        return KVCacheOptions(gpu_bytes=num_bytes if on_gpu else 0, host_bytes=num_bytes)

    yield Way("no cache", None)
    yield Way("empty cache", memory(roomy))
    yield Way("full, on the GPU" if on_gpu else "full", memory(roomy), is_filled=True)
    yield Way("half of the corpus", memory(corpus_bytes // 2))
    if on_gpu:
        yield Way("full, in host memory", KVCacheOptions(document, roomy), is_filled=True)
    on_disk = replace(memory(document), folder=folder, folder_bytes=roomy)
    yield Way("full, in a folder", on_disk, is_filled=True)
    half = memory(corpus_bytes // 2)
    half = replace(half, host_bytes=0) if on_gpu else half
    yield Way("half, all questions", half, takes_all=True)


@dataclass(frozen=True)
class Generated:
    """A run over some requests.

    Attributes:
        seconds: Its seconds.
        stats: Its statistics.
        memory: As of `Outcome`.
    """

    seconds: float
    stats: RunStats
    memory: tuple[tuple[int, int], ...]


def generate(engine: Engine, requests: list[Request], batch_size: int, tokens: int) -> Generated:
    """Generate, and look at the memory in use after each tenth."""
    started = time.perf_counter()
    run = engine.generate(requests, STRATEGY, max_new_tokens=tokens, batch_size=batch_size)
    done, memory = 0, list[tuple[int, int]]()
    for finished in run.batches():
        done += len(finished)
        if done * TENTHS >= len(requests) * (len(memory) + 1):
            memory.append(memory_in_use(engine.model.device))
    return Generated(time.perf_counter() - started, run.stats, tuple(memory))


def memory_in_use(device: torch.device) -> tuple[int, int]:
    """Return the bytes of tensors on a GPU, and of this process on the host."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    on_gpu = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return on_gpu, pages * os.sysconf("SC_PAGE_SIZE")


def measure(
    engine: Engine,
    way: Way,
    requests: list[Request],
    corpus: Corpus,
    arguments: argparse.Namespace,
) -> Outcome:
    """Run a way."""
    engine.close()
    if way.options is not None:
        engine.runner.use_store(way.options, arguments.shape, MODEL_FILES)
    # The executor is prepared anew for a store, and compiles what it has not compiled yet.
    engine.executor.release()
    generate(engine, requests[:2], arguments.batch_size, 3)
    if way.is_filled:
        generate(engine, requests, arguments.batch_size, 1)
    elif way.options is not None:
        engine.close()
        engine.runner.use_store(way.options, arguments.shape, MODEL_FILES)
        engine.executor.release()
    store = engine.runner.store
    before = store.counters.device if store else TierCounters()
    run = generate(engine, requests, arguments.batch_size, arguments.max_new_tokens)
    device = store.counters.device if store else TierCounters()
    hits, misses = device.hits - before.hits, device.misses - before.misses
    predicted = None
    if way.takes_all:
        predicted = predicted_hit_rate(
            corpus.num_bytes,
            sum(corpus.num_bytes) // 2,
            exponent=EXPONENT,
            questions=len(requests),
            per_question=len(requests[0].segments),
            together=arguments.batch_size,
            sorted_together=LOOKAHEAD_BATCHES * arguments.batch_size,
        )
    generate(engine, requests[:1], 1, 1)
    firsts = [generate(engine, [one], 1, 1).seconds for one in requests[:SINGLE]]
    stats = run.stats
    return Outcome(
        way.name,
        run.seconds,
        stats.prefill_s,
        stats.decode_s,
        1e3 * statistics.median(firsts),
        stats.computed_tokens,
        stats.copied_tokens,
        stats.cached_spans,
        stats.kept_spans,
        store.counters.device.evictions if store else 0,
        hits / (hits + misses) if hits + misses else None,
        predicted,
        run.memory,
    )


def main() -> None:
    """Measure, print a table and a line of JSON."""
    arguments = parse()
    everything = read_requests(str(arguments.requests))
    requests = everything[: arguments.limit]
    print(f"{'way':24}{COLUMNS}")
    peer = None
    if arguments.vllm_site or arguments.vllm_python != sys.executable:
        peer = measure_vllm(
            requests,
            shape=arguments.shape,
            max_new_tokens=arguments.max_new_tokens,
            num_single=SINGLE,
            time_limit_s=arguments.vllm_time_limit,
            python=arguments.vllm_python,
            site=arguments.vllm_site,
        )
        print(peer.line(), flush=True)
    else:
        print("vLLM: not run; --vllm-site names a folder with its packages")
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    engine = random_engine(arguments.shape, arguments.device, dtype)
    corpus = Corpus.of(engine, everything)
    corpus_bytes = sum(corpus.num_bytes)
    print(
        f"{len(everything):,} requests, {len(corpus.texts)} documents of "
        f"{sum(corpus.num_tokens):,} tokens, {corpus_bytes / 1e9:.2f} GB"
    )
    outcomes = []
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        for way in ways(engine, corpus_bytes, folder / "kv"):
            if arguments.ways and way.name not in arguments.ways:
                continue
            if way.takes_all and len(everything) <= len(requests):
                continue
            some = everything if way.takes_all else requests
            outcomes.append(measure(engine, way, some, corpus, arguments))
            print_outcome(outcomes[-1])
            record = {
                "requests": len(requests),
                "all_requests": len(everything),
                "documents": len(corpus.texts),
                "corpus_bytes": corpus_bytes,
                "arguments": {name: getattr(arguments, name) for name in SETTINGS},
                "outcomes": [asdict(one) for one in outcomes],
                "vllm": peer and asdict(peer),
                "environment": environment_stamp(),
            }
            if arguments.record:
                arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    finally:
        engine.close()
        shutil.rmtree(folder)
    if not outcomes:
        sys.exit("no way was run: --ways names none, or there are no requests beyond --limit")
    print(json.dumps(record))


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--limit", type=int, default=1000, help="requests of all ways but the last"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--ways", nargs="*", help="names of ways; default: all")
    parser.add_argument("--folder", type=Path, help="where the folder is made; default: temporary")
    parser.add_argument("--vllm-site", type=Path, help="folder with vLLM's packages")
    parser.add_argument("--vllm-python", default=sys.executable, help="a Python that has vLLM")
    parser.add_argument("--vllm-time-limit", type=float, default=280, help="seconds for vLLM")
    parser.add_argument("--record", type=Path)
    return parser.parse_args()


def print_outcome(one: Outcome) -> None:
    """Print a line of the table; of the hit rate and the memory, if they were asked for."""
    print(
        f"{one.name:24}{one.total_s:9.2f}{one.prefill_s:9.2f}{one.decode_s:9.2f}"
        f"{one.first_token_ms:10.1f}{one.computed_tokens:11,}{one.copied_tokens:11,}"
        f"{one.cached_spans:7,}{one.kept_spans:7,}{one.evictions:9,}",
        flush=True,
    )
    if one.hit_rate is not None and one.predicted_hit_rate is not None:
        print(f"  documents found: {one.hit_rate:.1%}, predicted {one.predicted_hit_rate:.1%}")
        for name, values in zip(("GPU", "host"), zip(*one.memory, strict=True), strict=True):
            shown = " ".join(f"{value / 2**30:.2f}" for value in values)
            print(f"  GiB on the {name} after each tenth: {shown}", flush=True)


if __name__ == "__main__":
    main()
