"""Finds the spans of prompts: tokens whose keys and values can be reused, proved on the mask.

A span is a run of prompt tokens that see themselves, causally, and all tokens of some spans before
them, its ancestors, and nothing else. So its keys and values are a function of its tokens, of its
ancestors and of the distances between their positions. `span_identity` is a digest of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexmask.block_mask.equality import spans_see
from flexmask.block_mask.regions import Regions, region_values
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import strategy_mask
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexmask.mod_types import MaskMod, RowMod

CPU = torch.device("cpu")

MAX_RUNS = 512
"""A prompt of more runs has no spans: each pair of runs would have to be looked at."""

SLOTS_AT_ONCE = 2**18
"""Slots of the prompts that are looked at together, which bounds memory."""

MOST_LAYOUTS = 2**14
"""Layouts whose spans are remembered; then all are forgotten."""


@dataclass(frozen=True)
class Span:
    """Prompt tokens that see themselves, causally, and all tokens of their ancestors.

    Attributes:
        start: Slot of the first token.
        stop: Slot behind the last token.
        ancestors: Indices of the spans that it sees, in the list of spans of its prompt.
    """

    start: int
    stop: int
    ancestors: tuple[int, ...]


class SpanFinder:
    """Finds the spans of prompts under one strategy, on the host.

    Layouts propose spans: runs of tokens with one segment id and consecutive positions. What each
    run sees is read off the mask at its first token, and then proved for all of its tokens. Layers
    with a sliding window mask more, by the distance of positions; that follows from what an
    identity contains, so it need not be looked at.

    Spans are remembered by the content of layouts, since equal layouts have equal masks.
    """

    def __init__(self, strategy: Strategy) -> None:
        """Find spans under ``strategy``."""
        self._strategy = strategy
        self._found: dict[bytes, tuple[Span, ...]] = {}

    def spans_of(self, layouts: Sequence[Layout]) -> list[tuple[Span, ...]]:
        """Return the spans of each prompt, in the order of their slots, without its last token."""
        if len(self._found) > MOST_LAYOUTS:
            self._found.clear()
        new = {layout.digest: layout for layout in layouts if layout.digest not in self._found}
        for some in _chunks(list(new.values())):
            for layout, spans in zip(some, self._find(some), strict=True):
                self._found[layout.digest] = spans
        return [self._found[layout.digest] for layout in layouts]

    def _find(self, layouts: Sequence[Layout]) -> list[tuple[Span, ...]]:
        runs = [_runs_of(layout) for layout in layouts]
        counts = [len(layout) - 1 for layout in layouts]
        size, capacity = len(layouts), max(map(len, layouts))
        batch = LayoutBatch(size, capacity, CPU)
        batch.load(layouts, counts, [0] * size)
        mask_mod = strategy_mask(self._strategy, batch)
        seen = _seen_by_first_tokens(mask_mod, runs)
        rows = [row for row, own in enumerate(runs) for _ in own]
        if not rows:
            return [() for _ in layouts]
        slots = torch.from_numpy(np.concatenate(runs)) - torch.tensor([0, 1])
        is_proved = spans_see(
            mask_mod,
            torch.tensor(rows),
            slots,
            [
                _joined(own[before])
                for own, of_run in zip(runs, seen, strict=True)
                for before in of_run
            ],
            torch.tensor([counts[row] for row in rows]),
        )
        is_proved &= ~self._may_change_scores(batch, torch.tensor(rows), slots)
        proofs = iter(is_proved.tolist())
        return [
            _spans(own, of_run, [next(proofs) for _ in own])
            for own, of_run in zip(runs, seen, strict=True)
        ]

    def _may_change_scores(self, batch: LayoutBatch, rows: Tensor, slots: Tensor) -> Tensor:
        """Return for each span whether scores of its queries may be changed."""
        changed = torch.zeros(len(rows), dtype=torch.bool)
        for queries in self._strategy.changed_queries(batch):
            rectangles = Regions.rectangles(rows, slots, slots)
            changed |= region_values(_of_queries(queries), rectangles)[1]
        return changed


def span_identity(
    layout: Layout,
    spans: Sequence[Span],
    index: int,
    ancestors: Mapping[int, bytes],
    stop: int | None = None,
    *,
    at_own_position: bool = False,
) -> bytes:
    """Return a digest of all that the keys and values of a span depend on, beside the model.

    Args:
        layout: The prompt.
        spans: Its spans.
        index: Index of the span.
        ancestors: Identities of the spans before it.
        stop: Slot behind the last token, to identify the first tokens of a span; None for all.
        at_own_position: True if they depend on the absolute position too.

    Returns:
        32 bytes.
    """
    span = spans[index]
    positions = layout.position_ids
    first_position = positions[span.start]
    content = blake2b(digest_size=32)
    for number in span.ancestors:
        distance = first_position - positions[spans[number].start]
        content.update(ancestors[number] + distance.to_bytes(8, "little", signed=True))
    content.update(b"tokens" if not at_own_position else b"at %d" % first_position)
    content.update(layout.token_array[span.start : stop or span.stop].tobytes())
    return content.digest()


def _of_queries(queries: RowMod) -> MaskMod:
    def of_queries(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return queries(b, q_idx)

    return of_queries


def _runs_of(layout: Layout) -> NDArray[np.int64]:
    """Return first slots and slots behind the runs of a prompt, ``(R, 2)``."""
    count = len(layout) - 1
    segments = layout.segment_array[:count]
    positions = layout.position_array[:count]
    is_first = (np.diff(segments) != 0) | (np.diff(positions) != 1)
    if layout.choice_lengths:
        is_first |= np.diff(layout.choice_array[:count]) != 0
    starts = np.flatnonzero(is_first) + 1
    if len(starts) >= MAX_RUNS:
        return np.empty((0, 2), np.int64)
    return np.stack((np.append(0, starts), np.append(starts, count)), 1)


def _seen_by_first_tokens(
    mask_mod: MaskMod, runs: Sequence[NDArray[np.int64]]
) -> list[list[list[int]]]:
    """Return for each run of each prompt the runs before it that its first token sees."""
    pairs = [
        (row, own[run, 0], own[before, 0])
        for row, own in enumerate(runs)
        for run in range(len(own))
        for before in range(run)
    ]
    seen = iter(())
    if pairs:
        rows, queries, keys = torch.from_numpy(np.array(pairs)).unbind(1)
        rectangles = Regions.rectangles(
            rows, queries[:, None].expand(-1, 2), keys[:, None].expand(-1, 2)
        )
        seen = iter(region_values(mask_mod, rectangles)[0].tolist())
    return [
        [[before for before in range(run) if next(seen)] for run in range(len(own))]
        for own in runs
    ]


def _joined(runs: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return first and last slots of runs, with those that lie side by side as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in runs.tolist():
        if joined and joined[-1][1] == start - 1:
            joined[-1] = (joined[-1][0], stop - 1)
        else:
            joined.append((start, stop - 1))
    return joined


def _spans(
    runs: NDArray[np.int64], seen: Sequence[Sequence[int]], is_proved: Sequence[bool]
) -> tuple[Span, ...]:
    """Make spans of the runs that are proved to see spans only."""
    spans: list[Span] = []
    index_of: dict[int, int] = {}
    for run, ((start, stop), before) in enumerate(zip(runs.tolist(), seen, strict=True)):
        if is_proved[run] and all(number in index_of for number in before):
            index_of[run] = len(spans)
            spans.append(Span(start, stop, tuple(index_of[number] for number in before)))
    return tuple(spans)


def _chunks(layouts: Sequence[Layout]) -> list[list[Layout]]:
    """Divide layouts, the longest first, so that the tables of each part have few slots."""
    chunks: list[list[Layout]] = []
    for layout in sorted(layouts, key=len, reverse=True):
        if not chunks or (len(chunks[-1]) + 1) * len(chunks[-1][0]) > SLOTS_AT_ONCE:
            chunks.append([])
        chunks[-1].append(layout)
    return chunks
