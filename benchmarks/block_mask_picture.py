"""Draw the tiles of a mask by state and by how each was decided: docs/block-masks.svg.

python benchmarks/block_mask_picture.py docs/block-masks.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from flexmask.block_mask import MaskReport, explain_mask
from flexmask.block_mask.tile_states import EMPTY, FULL, PARTIAL, Decided

LENGTH, TILE, SIDE = 3072, 128, 15
COLOURS = {EMPTY: "#f2f2ef", PARTIAL: "#f3b35c", FULL: "#3f6fa8"}
NAMES = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}
MARKS = {
    Decided.BY_INTERVALS: "",
    Decided.BY_SUB_TILES: "▪",
    Decided.BY_SAMPLES: "·",
    Decided.BY_PAIRS: "×",
}
MEANINGS = {
    Decided.BY_INTERVALS: "decided by intervals over the whole tile",
    Decided.BY_SAMPLES: "by 4 × 4 of its pairs",
    Decided.BY_SUB_TILES: "by intervals over its sub-tiles",
    Decided.BY_PAIRS: "by pairs of undecided sub-tiles",
}


def explained() -> MaskReport:
    """Explain a mask of three isolated segments and a fusion tail."""
    segment_ids = torch.zeros(LENGTH, dtype=torch.int32)
    for segment, start in enumerate((0, 1000, 1790, 2750)):
        segment_ids[start:] = segment
    tail = int(segment_ids[-1])

    def isolated(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q_segment = segment_ids[q_idx]
        sees = (q_segment == segment_ids[kv_idx]) | (q_segment == tail)
        return (q_idx >= kv_idx) & sees

    return explain_mask(isolated, None, None, LENGTH, LENGTH, "cpu", TILE)


def picture(report: MaskReport) -> str:
    """Draw the report as SVG."""
    states, decided = report.states[0, 0].tolist(), report.decided[0, 0].tolist()
    size = len(states) * SIDE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-24 0 {size + 390} {size + 30}" '
        'font-family="sans-serif" font-size="13">',
        f'<text x="{size / 2}" y="14" text-anchor="middle">keys →</text>',
        f'<text transform="rotate(-90)" x="{-22 - size / 2}" y="-8" text-anchor="middle">'
        "← queries</text>",
    ]
    for row, line in enumerate(states):
        for column, state in enumerate(line):
            parts.append(tile(column * SIDE, 22 + row * SIDE, state, decided[row][column]))
    parts += legend(report, size + 20)
    return "\n".join([*parts, "</svg>\n"])


def tile(x: int, y: int, state: int, how: int) -> str:
    """Draw one tile."""
    square = (
        f'<rect x="{x}" y="{y}" width="{SIDE - 1}" height="{SIDE - 1}" fill="{COLOURS[state]}"/>'
    )
    mark = MARKS[Decided(how)]
    if not mark:
        return square
    ink = "#ffffff" if state == FULL else "#222222"
    middle = f'x="{x + SIDE / 2 - 0.5}" y="{y + SIDE / 2 + 4}" text-anchor="middle"'
    return f'{square}<text {middle} fill="{ink}">{mark}</text>'


def legend(report: MaskReport, x: int) -> list[str]:
    """Draw the legend of colours and marks, with the number of tiles of each."""
    lines: list[tuple[str, str]] = []
    for state, name in NAMES.items():
        lines.append((tile(x, 0, state, Decided.BY_INTERVALS), f"{name}: {count(report, state)}"))
    for how, meaning in MEANINGS.items():
        number = int((report.decided == how).sum())
        lines.append((tile(x, 0, EMPTY, how), f"{meaning}: {number}"))
    drawn = []
    for i, (square, text) in enumerate(lines):
        y = 30 + i * 24 + (12 if i >= len(NAMES) else 0)
        label = f'<text x="{x + SIDE + 8}" y="12">{text}</text>'
        drawn.append(f'<g transform="translate(0 {y})">{square}{label}</g>')
    return drawn


def count(report: MaskReport, state: int) -> int:
    """Count the tiles of a state."""
    return int((report.states == state).sum())


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.output.write_text(picture(explained()), encoding="utf-8")


if __name__ == "__main__":
    main()
