"""Writes the tables of strategies and fusions from benchmarks/results: ``make docs``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TARGETS = (README, ROOT / "docs" / "compare.md")
RESULTS = {
    "compare-real": ROOT / "benchmarks" / "results" / "compare-h100-smollm2.json",
    "compare": ROOT / "benchmarks" / "results" / "compare-cpu-demo.json",
}
"""Results shown in tables, by the marker before each table."""
PLAIN = " of causal"
COUNTS = (1, 3, 5)
HEAD = ("", "1", "3", "5", "5 less the first alone", "prompt tokens", "computed", "ms/question")
NUM_COLUMNS = {README: 5}
"""Number of columns of HEAD that a document shows; documents not listed show all."""


def table(result: Path, num_columns: int) -> str:
    """Return a table with a line for each strategy, and for each fusion under ``causal``.

    The last columns are those of the highest number of paraphrases.
    """
    cells = json.loads(result.read_text())["cells"]
    for cell in cells:
        cell["name"] = cell["name"].removesuffix(PLAIN)
    names = dict.fromkeys(cell["name"] for cell in cells if " of " not in cell["name"])
    lines = [HEAD, ["---"] * len(HEAD)]
    for name in names:
        of_count = {cell["num_segments"]: cell for cell in cells if cell["name"] == name}
        most = of_count.get(COUNTS[-1])
        scores = [_percent(of_count[n]["score"]) if n in of_count else "" for n in COUNTS]
        lines.append([f"`{name}`", *scores, *(_last_columns(most) if most else [""] * 4)])
    return "".join(f"| {' | '.join(line[:num_columns])} |\n" for line in lines)


def page(target: Path) -> str:
    """Return the text of a document with its tables replaced."""
    num_columns = NUM_COLUMNS.get(target, len(HEAD))
    text = target.read_text()
    for mark, result in RESULTS.items():
        written = rf"\g<1>{table(result, num_columns)}\g<2>"
        pattern = rf"(<!-- {mark} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, written, text, flags=re.DOTALL)
    return text


def _last_columns(cell: dict[str, Any]) -> list[str]:
    return [
        _percent(cell["difference"], "+"),
        *(f"{cell[name]:.0f}" for name in ("prompt_tokens", "computed_tokens", "ms_per_question")),
    ]


def _percent(estimate: dict[str, float], sign: str = "") -> str:
    mean, low, high = (100 * estimate[name] for name in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


if __name__ == "__main__":
    for target in TARGETS:
        target.write_text(page(target))
