"""The cells of a figure of single tokens: as an SVG file draws them, and as they must be."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexmask.show.palette import part_colour, rgb
from flexmask.show.tokens import ShownRequest
from flexmask.strategy import Strategy
from oracles import dense_mask


def expected_colours(strategy: Strategy, shown: ShownRequest, tile: int) -> NDArray[np.uint8]:
    """From the plain-Python oracle: what a figure of single tokens must show."""
    layout = strategy.layout(shown.tokens).extended(shown.new_tokens)
    allowed = dense_mask(strategy, layout).numpy()
    prompt = len(layout) - shown.new_tokens
    keys = [part_colour(s, slot >= prompt) for slot, s in enumerate(layout.segment_ids)]
    colours = np.full((*allowed.shape, 3), 255, dtype=np.uint8)
    for top in range(0, len(layout), tile):
        for left in range(0, len(layout), tile):
            corner = np.s_[top : top + tile, left : left + tile]
            if not allowed[corner].any():
                colours[corner] = rgb("#E9E9E6")
    for q, kv in np.argwhere(allowed):
        colours[q, kv] = rgb(keys[kv])
    return colours


def svg_cells(path: Path, size: int) -> NDArray[np.uint8]:
    """Colours of cells, from the squares that an SVG file draws."""
    found = np.full((size, size, 3), 255, dtype=np.uint8)
    tree = ElementTree.parse(path)
    paths = [
        (element.get("d", ""), re.search(r"fill: (#\w{6})", element.get("style", "")))
        for element in tree.iter("{http://www.w3.org/2000/svg}path")
    ]
    frame = max(
        (_numbers(d) for d, fill in paths if fill and d.count("M") == 1 and "C" not in d),
        key=lambda points: np.ptp(points[:, 0]) if _is_frame(points) else 0,
    )
    left, top = frame.min(0)
    side = np.ptp(frame[:, 0]) / size
    for d, fill in paths:
        if fill is None:
            continue
        for outline in re.findall(r"M[^Mz]*z", d):
            points = _numbers(outline)
            x0, y0 = ((points.min(0) - (left, top)) / side).round(3)
            x1, y1 = ((points.max(0) - (left, top)) / side).round(3)
            if 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size:
                columns = slice(int(x0), int(np.ceil(x1)))
                found[int(y0) : int(np.ceil(y1)), columns] = rgb(fill[1])
    return found


def _is_frame(points: NDArray[np.float64]) -> bool:
    """Whether an outline is the square of the axes, and not the whole figure."""
    return bool(points.min() > 1 and abs(np.ptp(points[:, 0]) - np.ptp(points[:, 1])) < 0.01)


def _numbers(d: str) -> NDArray[np.float64]:
    return np.array(re.findall(r"-?\d+\.?\d*", d), dtype=float).reshape(-1, 2)
