"""Which ways are the same, proved: their prompts have equal tokens, positions and masks.

With one segment, or where each segment is a prompt of its own, strategies that differ only in
which segments see each other make the same prompts. Such ways are run once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b

import torch

from flexmask.block_mask.equality import masks_are_equal
from flexmask.comparison.cell import ATTENTION, Cell, Way
from flexmask.dataset.requests import BadRow
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import strategy_mask
from flexmask.request import Request
from flexmask.tokenization import RequestTokenizer

PROMPTS_AT_ONCE = 256
"""How many masks are compared in one go."""


class Sameness:
    """Compares ways over the requests that they are run on."""

    def __init__(
        self,
        requests_of: Mapping[int | None, Sequence[Request | BadRow]],
        tokenizer: RequestTokenizer,
        max_new_tokens: int,
    ) -> None:
        """Take the requests by the number of segments that they were cut to."""
        self._requests_of = requests_of
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._digests: dict[Way, bytes] = {}

    def cells(self, ways: Sequence[Way]) -> list[Cell]:
        """Join ways that are the same; each cell stands where its first way stood."""
        groups: list[list[Way]] = []
        for way in ways:
            for group in groups:
                if self._are_same(way, group[0]):
                    group.append(way)
                    break
            else:
                groups.append([way])
        return [_cell(group, ways) for group in groups]

    def _are_same(self, way: Way, other: Way) -> bool:
        try:
            return self._digest(way) == self._digest(other) and self._masks_are_equal(way, other)
        except Exception:  # a strategy's own; its cell will say so
            return False

    def _digest(self, way: Way) -> bytes:
        """Identifies tokens and positions of all prompts, and how they are fused."""
        if way not in self._digests:
            hashed = blake2b(digest_size=16)
            for layouts in self._layouts(way):
                fusion = str(way.fusion) if len(layouts) > 1 else ""
                parts = [(layout.token_ids, layout.position_ids) for layout in layouts]
                hashed.update(repr((fusion, parts)).encode())
            self._digests[way] = hashed.digest()
        return self._digests[way]

    def _layouts(self, way: Way) -> Iterator[list[Layout]]:
        """The prompts of each generation."""
        for request in self._requests_of[way.num_segments]:
            if isinstance(request, Request):
                for output in way.fusion.outputs(request):
                    prompts = map(self._tokenizer, way.fusion.prompts(output))
                    yield [*map(way.contender.strategy.layout, prompts)]

    def _masks_are_equal(self, way: Way, other: Way) -> bool:
        if way.contender == other.contender:
            return True
        layouts, others = (
            [layout for some in self._layouts(each) for layout in some] for each in (way, other)
        )
        return all(
            self._are_equal_masks(way, layouts[start:stop], other, others[start:stop])
            for start in range(0, len(layouts), PROMPTS_AT_ONCE)
            for stop in [start + PROMPTS_AT_ONCE]
        )

    def _are_equal_masks(
        self, way: Way, layouts: Sequence[Layout], other: Way, others: Sequence[Layout]
    ) -> bool:
        lengths = [len(layout) for layout in layouts]
        shape = (len(layouts), max(lengths) + self._max_new_tokens)
        cpu = torch.device("cpu")
        masks = []
        for contender, own in ((way.contender, layouts), (other.contender, others)):
            batch = LayoutBatch(*shape, cpu)
            batch.load(own, lengths, [0] * len(own))
            batch.open_tail(lengths)
            if contender.strategy.score_mod(batch) is not None:
                return False
            masks.append(strategy_mask(contender.strategy, batch))
        rows, size = shape
        return masks_are_equal(masks[0], masks[1], rows, size, size, cpu)


def _cell(group: Sequence[Way], ways: Sequence[Way]) -> Cell:
    """The cell of ways that are the same.

    Where it holds a fusion with every strategy, no strategy is named.
    """
    names: dict[str, None] = {}
    for way in group:
        alike = [
            other
            for other in ways
            if (other.fusion, other.num_segments) == (way.fusion, way.num_segments)
        ]
        is_of_all = len(alike) > 1 and set(alike) <= set(group)
        names[f"{_name_of_all(way) if is_of_all else way.name} ({way.segments})"] = None
    first, *others = names
    return Cell(group[0], first.rpartition(" ")[0], tuple(others))


def _name_of_all(way: Way) -> str:
    return "any strategy" if way.fusion == ATTENTION else str(way.fusion)
