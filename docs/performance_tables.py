"""Writes the tables of docs/performance.md, and of speed in README.md: ``make docs``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT_FIRST_TOKENS = "document-reuse-first-token-*.json"
BESIDE_VLLM = "vllm-peer-*.json"
"""Records of flexmask beside vLLM: one of all parts, or several of some parts each."""


def decode_table(gpu: str) -> str:
    """Return the table of decode speed, of flexmask and its peers."""
    rows = [
        [
            result["way"],
            str(result["batch_size"]),
            f"{result['context']:,}",
            f"{result['ms_per_step']:.2f}",
            f"{result['tokens_per_s']:,.0f}",
            f"{result['floor_share']:.0%}",
            f"{result['first_s']:.0f}",
        ]
        for result in _result(f"generation-{gpu}")["results"]
    ]
    head = ["way", "batch", "context", "ms/step", "tokens/s", "of the floor", "first token, s"]
    return _table(head, rows)


def attention_table() -> str:
    """Return the table of attention alone: a row for each way and a column for each case."""
    results = _result("attention-h100")["results"]
    cases = list(dict.fromkeys(result["case"] for result in results))
    ways = list(dict.fromkeys(result["way"] for result in results))
    ms = {(result["case"], result["way"]): f"{result['ms']:.3f}" for result in results}
    rows = [[way, *(ms.get((case, way), "") for case in cases)] for way in ways]
    return _table(["ms", *cases], rows)


def first_token_table() -> str:
    """Return the table of times to the first token of a process."""
    found = {
        "nothing": "neither compiled code nor Python bytecode",
        "cold": "empty compile caches",
        "again": "a second process, median of {}",
    }
    starts: dict[tuple[str, str], list[dict[str, float]]] = {}
    for start in _result("first-token-h100")["starts"]:
        starts.setdefault((start["way"], start["caches"]), []).append(start)
    rows = []
    for (way, caches), them in starts.items():
        first = [start["first_token_s"] for start in them]
        spread = f"{min(first):.1f} to {max(first):.1f}" if len(them) > 1 else ""
        times = [
            f"{median(start[time] for start in them):.1f}"
            for time in ("first_token_s", "after_loading_s", "total_s")
        ]
        rows.append([way, found[caches].format(len(them)), times[0], spread, *times[1:]])
    head = ["way", "caches", "first token, s", "range", "of it after loading", "end, s"]
    return _table(head, rows)


def block_mask_table() -> str:
    """Return the table of BlockMasks on a GPU, with torch's builder and flexmask's."""
    rows = []
    for result in _result("block-mask-h100")["results"]:
        case = result["case"]
        timing = [result["status"], "", ""]
        if result["median_ms"] is not None:
            spread = f"{result['fastest_ms']:.3g} to {result['slowest_ms']:.3g}"
            timing = [f"{result['median_ms']:.3g}", spread, f"{result['first_ms']:,.0f}"]
        rows.append([f"{case['length']:,}", case["mask"], case["builder"], *timing])
    return _table(["length", "mask", "builder", "ms", "range", "first call, ms"], rows)


def dataset_table() -> str:
    """Return the table of a data set: compile caches empty, then filled, and no shared prefix."""
    runs = _result("dataset-run-h100")["runs"]
    shown: dict[str, tuple[str, Callable[[Any], str]]] = {
        "total_s": ("total seconds", "{:.1f}".format),
        "rows_per_s": ("rows/s", "{:.0f}".format),
        "tokens_per_s": ("generated tokens/s", "{:,.0f}".format),
        "prompt_tokens": ("prompt tokens", "{:,}".format),
        "computed_tokens": ("prompt tokens computed", "{:,}".format),
        "prefill_s": ("seconds of prefill", "{:.1f}".format),
        "prefill_share": ("share of time in prefill", "{:.0%}".format),
        "decode_share": ("share of time in decode", "{:.0%}".format),
        "host_share": ("share of time on the host only", "{:.0%}".format),
        "compilations": ("compilations", str),
        "warm_compilations": ("compilations after the first batch", str),
        "prefill_peak_bytes": ("peak memory in prefill, GB", lambda n: f"{n / 1e9:.1f}"),
        "decode_peak_bytes": ("peak memory in decode, GB", lambda n: f"{n / 1e9:.1f}"),
    }
    rows = [
        [label, *(form(run[name]) for run in runs.values())]
        for name, (label, form) in shown.items()
    ]
    return _table(["", "first run of the process", "second run", "no prefix cache"], rows)


def dataset_peers_table() -> str:
    """Return the table of other ways to run rows of that data set, in the same run."""
    record = _result("dataset-run-h100")
    own = record["runs"]["warm"]["rows_per_s"]
    rows = [["flexmask", f"{own:.0f}", ""]]
    for way, rows_per_s in record["peers_rows_per_s"].items():
        rows.append([way, f"{rows_per_s:.2f}", f"{own / rows_per_s:.1f}"])
    return _table(["way", "rows/s", "speedup of flexmask"], rows)


def methods_table() -> str:
    """Return the table of the cost of each strategy and fusion on that data set."""
    rows = []
    for cost in (cost for run in _result("method-cost-h100")["runs"] for cost in run["ways"]):
        stats = cost["stats"]
        generated = stats["generated_tokens"]
        rows.append(
            [
                f"`{cost['way']}`",
                f"{cost['total_s']:.1f}",
                f"{generated / cost['total_s']:,.0f}",
                f"{stats['prompt_tokens']:,}",
                f"{stats['computed_tokens']:,}",
                f"{stats['prefill_s']:.1f}",
                f"{stats['decode_s']:.1f}",
            ]
        )
    head = ["way", "seconds", "tokens/s", "prompt tokens", "computed", "prefill, s", "decode, s"]
    return _table(head, rows)


def vllm_cases_table() -> str:
    """Return the table of decoding and first tokens beside vLLM."""
    rows = [
        [
            f"{'decode' if each['part'] == 'decode' else 'first token'}, {_size(each)}",
            f"`{each['way']}`",
            *(cell for engine in ("flexmask", "vllm") for cell in _timing(each, engine)),
            _speedup(each),
        ]
        for each in _beside_vllm()
        if each["part"] != "dataset"
    ]
    head = ["", "strategy", "flexmask", "range", "of the floor", "vLLM", "range", "of the floor"]
    return _table([*head, "speedup"], rows)


def vllm_dataset_table() -> str:
    """Return the table of a data set beside vLLM."""
    rows = []
    for each in _beside_vllm():
        if each["part"] != "dataset":
            continue
        own, peer = each["flexmask"], each["vllm"]
        tokens = [
            f"{own[name]:,}" if own else NOT_RUN for name in ("least_tokens", "computed_tokens")
        ]
        rows.append(
            [
                f"`{each['way']}`",
                *_timing(each, "flexmask")[::2],
                *tokens,
                f"`{peer['way']}`" if peer else NOT_RUN,
                *_timing(each, "vllm")[::2],
                f"{peer['computed_tokens']:,}" if peer else NOT_RUN,
                _speedup(each),
            ]
        )
    head = ["way", "flexmask", "of the floor", "tokens at least", "computed"]
    return _table([*head, "vLLM runs", "vLLM", "of the floor", "computed", "speedup"], rows)


def vllm_summary() -> str:
    """Return README's tables beside vLLM: decoding and first tokens, then the data set."""
    comparisons = _beside_vllm()
    cases = [each for each in comparisons if each["way"] == "causal"]
    sizes = list(dict.fromkeys(map(_size, cases)))
    rows = []
    for part, label in (("decode", "decode, tokens/s"), ("first_token", "first token, ms")):
        pairs = {_size(each): _pair(each) for each in cases if each["part"] == part}
        rows.append([label, *(pairs.get(size, "") for size in sizes)])
    dataset = [each for each in comparisons if each["part"] == "dataset"]
    questions = f"{dataset[0]['rows']:,} questions" if dataset else "questions"
    ways = [f"`{each['way']}`" for each in dataset]
    seconds = ["seconds", *map(_pair, dataset)]
    return "\n".join(
        [
            _table(
                ["flexmask / vLLM (of the floor)", *(f"{size} tokens" for size in sizes)], rows
            ),
            _table([questions, *ways], [seconds]),
        ]
    )


def documents_table() -> str:
    """Return the table of documents that recur."""
    rows = [
        [
            one["name"],
            f"{one['total_s']:.1f}",
            f"{one['prefill_s']:.1f}",
            f"{one['decode_s']:.1f}",
            f"{one['computed_tokens']:,}",
            f"{one['copied_tokens']:,}",
            f"{one['kept_spans']:,}",
            f"{one['evictions']:,}",
            f"{one['first_token_ms']:.0f}",
        ]
        for one in _result("document-reuse-h200")["outcomes"]
    ]
    head = ["cache", "seconds", "prefill, s", "decode, s", "tokens computed", "copied"]
    return _table([*head, "spans computed", "evicted", "one first token, ms"], rows)


def document_first_token_table() -> str:
    """Return the table of first tokens of single prompts, from all records of them."""
    rows = [
        [record["environment"]["gpu"], one["name"], f"{one['first_token_ms']:.0f}"]
        for record in _results(DOCUMENT_FIRST_TOKENS)
        for one in record["outcomes"]
    ]
    return _table(["GPU", "cache", "one first token, ms"], rows)


NOT_RUN = "–"


def _beside_vllm() -> list[dict[str, Any]]:
    return [each for record in _results(BESIDE_VLLM) for each in record["comparisons"]]


def _size(comparison: Mapping[str, Any]) -> str:
    return f"{comparison['rows']} × {comparison['context']:,}"


def _value(part: str, rows: int, seconds: float) -> str:
    """A time as a number: tokens/s, ms or s."""
    if part == "decode":
        return f"{rows / seconds:,.0f}"
    return f"{1e3 * seconds:.1f}" if part == "first_token" else f"{seconds:.2f}"


def _timing(comparison: Mapping[str, Any], engine: str) -> list[str]:
    """The time of an engine, the range of its runs, and its share of the floor."""
    figure, part = comparison[engine], comparison["part"]
    if figure is None:
        return [NOT_RUN] * 3
    unit = {"decode": "tokens/s", "first_token": "ms", "dataset": "s"}[part]
    median, *ends = (
        _value(part, comparison["rows"], seconds)
        for seconds in (figure["median_s"], min(figure["seconds"]), max(figure["seconds"]))
    )
    low, high = ends[::-1] if part == "decode" else ends
    return [f"{median} {unit}", f"{low} to {high}", f"{figure['floor_share']:.0%}"]


def _pair(comparison: Mapping[str, Any]) -> str:
    """The times of both engines, each with its share of the floor."""
    cells = [
        f"{_value(comparison['part'], comparison['rows'], figure['median_s'])} "
        f"({figure['floor_share']:.0%})"
        if figure
        else NOT_RUN
        for figure in (comparison["flexmask"], comparison["vllm"])
    ]
    return " / ".join(cells)


def _speedup(comparison: Mapping[str, Any]) -> str:
    own, peer = comparison["flexmask"], comparison["vllm"]
    return f"{peer['median_s'] / own['median_s']:.2f}" if own and peer else NOT_RUN


Tables = dict[str, Callable[[], str]]
TABLES: Tables = {
    "decode": partial(decode_table, "h100"),
    "decode, H200": partial(decode_table, "h200"),
    "attention": attention_table,
    "first token": first_token_table,
    "block masks": block_mask_table,
    "dataset": dataset_table,
    "dataset peers": dataset_peers_table,
    "methods": methods_table,
    "documents": documents_table,
    "document first tokens": document_first_token_table,
}


def targets() -> dict[Path, Tables]:
    """Return the tables of each document; those beside vLLM once there is a record of them."""
    if not any(RESULTS.glob(BESIDE_VLLM)):
        return {PAGE: TABLES, README: {}}
    beside_vllm = {"vllm cases": vllm_cases_table, "vllm dataset": vllm_dataset_table}
    return {PAGE: TABLES | beside_vllm, README: {"vllm": vllm_summary}}


def page(target: Path, tables: Tables) -> str:
    """Return the text of a document with its tables replaced."""
    text = target.read_text()
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, rf"\g<1>{table()}\g<2>", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{target}: expected one table {name!r}, found {count}")
    return text


def _results(pattern: str) -> list[dict[str, Any]]:
    """Read the records whose file names match a pattern."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def _result(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    for target, tables in targets().items():
        target.write_text(page(target, tables))
