"""Prints the table of `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexmask_cli.render.lines import print_warnings
from flexmask_cli.render.table import percent, print_table
from flexmask_cli.streams import write_text

if TYPE_CHECKING:
    from flexmask.compare.table import CellResult


def print_comparison(results: Sequence[CellResult]) -> None:
    """Print the results of all cells, equal ways and errors."""
    rows = [_comparison_row(result) for result in results]
    used = [name for name in rows[0] if any(row[name] for row in rows)]
    print_table([{name: row[name] for name in used} for row in rows], wrapped=["what"])
    for result in results:
        if result.cell.same:
            write_text(f"{result.cell.title} is also {', '.join(result.cell.same)}")
    for result in results:
        if result.error:
            print_warnings([f"{result.cell.title} failed: {result.error}"])


def _comparison_row(result: CellResult) -> dict[str, str]:
    figures = result.figures()

    def number(name: str, form: str, factor: float = 1.0) -> str:
        return "" if figures[name] is None else format(figures[name] * factor, form)

    against = result.against_first
    return {
        "what": result.cell.name,
        "segments": result.cell.way.segments,
        "accuracy": percent(result.score) if result.score else "failed" if result.error else "",
        "against the first": percent(against.difference, sign="+") if against else "",
        "logprob": number("mean_logprob", ".2f"),
        "tokens/s": number("tokens_per_s", ",.0f"),
        "ms/question": number("ms_per_question", ",.1f"),
        "first token ms": number("first_token_ms", ",.1f"),
        "prompt tokens": number("prompt_tokens", ",.0f"),
        "computed": number("computed_tokens", ",.0f"),
        "peak GB": number("peak_bytes", ".2f", 1e-9),
    }
