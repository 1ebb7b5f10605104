r"""Measures a data set of documents that recur, with and without a cache of keys and values.

Requests are those of ``document_questions.py``. Each way runs all of them with one engine, and
then the first token of single requests, each of other documents. ``full`` ways find all documents
in the cache: on the GPU, in host memory (the tier on the GPU holds one document) or in a folder.
A cache of half of the corpus shows evictions.

Examples:
    python benchmarks/document_questions.py myriadlama_1000.jsonl > questions.jsonl
    python benchmarks/document_reuse.py --requests questions.jsonl --record reuse.json
    python benchmarks/document_reuse.py --requests questions.jsonl --shape tiny --device cpu \
        --limit 6 --batch-size 2
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from flexmask import Engine, Request, read_requests
from flexmask.engine import RunStats
from flexmask.kv_store.options import KVCacheOptions
from random_model import SHAPES, random_engine
from stamp import environment_stamp

STRATEGY = "parallel_context"
MODEL_FILES = {"weights": "random, seed 0"}
SETTINGS = ("shape", "device", "limit", "batch_size", "max_new_tokens", "ways")
"""Arguments that results depend on; the others are paths."""
SINGLE = 12
"""Requests whose first token is measured."""


@dataclass(frozen=True)
class Way:
    """A way to run.

    Attributes:
        name: Its name in the table.
        options: Where keys and values are kept; None for nowhere.
        is_filled: Whether the cache has all documents before.
    """

    name: str
    options: KVCacheOptions | None
    is_filled: bool = False


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


def generate(
    engine: Engine, requests: list[Request], batch_size: int, tokens: int
) -> tuple[float, RunStats]:
    """Generate; return seconds and statistics."""
    started = time.perf_counter()
    run = engine.generate(requests, STRATEGY, max_new_tokens=tokens, batch_size=batch_size)
    for _ in run.batches():
        pass
    return time.perf_counter() - started, run.stats


def measure(
    engine: Engine, way: Way, requests: list[Request], arguments: argparse.Namespace
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
    seconds, stats = generate(engine, requests, arguments.batch_size, arguments.max_new_tokens)
    generate(engine, requests[:1], 1, 1)
    firsts = [generate(engine, [one], 1, 1)[0] for one in requests[:SINGLE]]
    store = engine.runner.store
    return Outcome(
        way.name,
        seconds,
        stats.prefill_s,
        stats.decode_s,
        1e3 * statistics.median(firsts),
        stats.computed_tokens,
        stats.copied_tokens,
        stats.cached_spans,
        stats.kept_spans,
        store.counters.device.evictions if store else 0,
    )


def main() -> None:
    """Measure, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--ways", nargs="*", help="names of ways; default: all")
    parser.add_argument("--folder", type=Path, help="where the folder is made; default: temporary")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    requests = list(islice(read_requests(str(arguments.requests)), arguments.limit))
    on_gpu = arguments.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    engine = random_engine(arguments.shape, arguments.device, dtype)
    documents = {segment for request in requests for segment in request.segments}
    tokens = sum(len(ids) for ids in engine.tokenizer(sorted(documents))["input_ids"])
    corpus_bytes = span_bytes(engine, tokens)
    print(
        f"{len(requests)} requests, {len(documents)} documents of {tokens} tokens, "
        f"{corpus_bytes / 1e9:.2f} GB"
    )
    print(
        f"{'way':24}{'seconds':>9}{'prefill':>9}{'decode':>9}{'first ms':>10}{'computed':>11}"
        f"{'copied':>11}{'hits':>7}{'kept':>7}{'evicted':>9}"
    )
    outcomes = []
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        for way in ways(engine, corpus_bytes, folder / "kv"):
            if arguments.ways and way.name not in arguments.ways:
                continue
            one = measure(engine, way, requests, arguments)
            outcomes.append(one)
            print(
                f"{one.name:24}{one.total_s:9.2f}{one.prefill_s:9.2f}{one.decode_s:9.2f}"
                f"{one.first_token_ms:10.1f}{one.computed_tokens:11,}{one.copied_tokens:11,}"
                f"{one.cached_spans:7,}{one.kept_spans:7,}{one.evictions:9,}",
                flush=True,
            )
            record = {
                "requests": len(requests),
                "documents": len(documents),
                "corpus_bytes": corpus_bytes,
                "arguments": {name: getattr(arguments, name) for name in SETTINGS},
                "outcomes": [asdict(one) for one in outcomes],
                "environment": environment_stamp(),
            }
            if arguments.record:
                arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    finally:
        engine.close()
        shutil.rmtree(folder)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
