"""Prints what `bench` measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexmask_cli.render.table import print_table
from flexmask_cli.streams import write_text

if TYPE_CHECKING:
    from flexmask.bench.attention_timing import AttentionBench, Floor, Timing
    from flexmask.show.picture_source import Subject
    from flexmask.strategy import Strategy


def print_attention_case(subject: Subject, strategy: Strategy, case: AttentionBench) -> None:
    """Print the strategy, the prompt and the shape of attention."""
    from flexmask.show.mask_picture import strategy_title

    figures = case.figures()
    heads = figures["heads"]
    write_text(
        f"{strategy_title(strategy)}: {subject.heading}\n"
        f"{figures['tokens']:,} tokens, {figures['density']:.1%} of pairs allowed; "
        f"{heads['query']} query and {heads['key']} key heads of {heads['dim']}, "
        f"{figures['dtype']} on {figures['device']}\n",
    )


def print_attention_timings(timings: Sequence[Timing], floor: Floor) -> None:
    """Print the table of timings."""
    rows = [_timing_row(timing, floor) for timing in timings]
    bound = "operations" if floor.compute_ms >= floor.read_ms else "memory"
    last = {
        "way": "floor",
        "ms": f"{floor.ms:.3f}",
        "note": f"{bound}; measured {floor.flops_per_s / 1e12:.3g} TFLOP/s, "
        f"{floor.bytes_per_s / 1e9:.3g} GB/s",
    }
    print_table([*rows, {name: last.get(name, "") for name in rows[0]}], wrapped=["note"])


def _timing_row(timing: Timing, floor: Floor) -> dict[str, str]:
    ms, error = timing.ms, timing.relative_error
    return {
        "way": timing.way,
        "ms": f"{ms.median:.3f}" if ms else "",
        "quartiles": f"{ms.low:.3f} to {ms.high:.3f}" if ms else "",
        "TFLOP/s": "" if timing.tflops is None else f"{timing.tflops:.3g}",
        "of the floor": f"{floor.ms / ms.median:.0%}" if ms else "",
        "relative error": "" if error is None else f"{error:.0e}",
        "note": timing.note,
    }
