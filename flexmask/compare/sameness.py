"""Finds ways that run the same prompts: equal tokens and positions, and masks checked as equal.

With one segment, or with each segment as a prompt of its own, strategies that differ only in
which segments see each other give the same prompts. Such ways are run once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from itertools import chain

import torch

from flexmask.block_mask.equality import masks_are_equal
from flexmask.compare.cell import ATTENTION, Cell, Contender, Way
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import strategy_mask
from flexmask.request import Request
from flexmask.tasks.request_source import BadRow

CPU = torch.device("cpu")
PROMPTS_AT_ONCE = 256
"""Number of masks compared at once."""


@dataclass(frozen=True)
class _Prompts:
    """Digests of all prompts of a way.

    Attributes:
        fusion: Name of the fusion; empty if each generation has a single prompt.
        tokens: Digest of tokens, positions and choices, and of the seeds of sampling.
        segments: Digest of the layouts, on which a mask may depend.
    """

    fusion: str
    tokens: bytes
    segments: bytes


class Sameness:
    """Compares ways on the requests that they run on."""

    def __init__(
        self,
        requests_of: Mapping[int | None, Sequence[Request | BadRow]],
        tokenizer: RequestTokenizer,
        max_new_tokens: int,
        *,
        is_greedy: bool = True,
    ) -> None:
        """Prepare to compare.

        Args:
            requests_of: The requests, by their number of segments.
            tokenizer: Tokenizes requests.
            max_new_tokens: Maximum number of generated tokens per request; 0 where choices are
                scored.
            is_greedy: Whether decoding is greedy; with sampling, ways with other seeds differ.
        """
        self._is_greedy = is_greedy
        self._requests_of = requests_of
        self._max_new_tokens = max_new_tokens
        self._tokenized = cache(tokenizer)
        self._choices = cache(tokenizer.choices)
        self._digests = cache(self._find_digests)
        self._prompts = cache(self._find_prompts)
        self._equal: dict[tuple[Contender, Contender, bytes, bytes], bool] = {}

    def cells(self, ways: Sequence[Way]) -> list[Cell]:
        """Group equal ways into cells, in the order of their first ways."""
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
            mine, others = self._prompts(way), self._prompts(other)
            if (mine.fusion, mine.tokens) != (others.fusion, others.tokens):
                return False
            key = (way.contender, other.contender, mine.segments, others.segments)
            if key not in self._equal:
                self._equal[key] = way.contender == other.contender or self._masks_are_equal(
                    way, other
                )
            return self._equal[key]
        except Exception:  # raised by the strategy; its cell reports it
            return False

    def _find_prompts(self, way: Way) -> _Prompts:
        tokens, segments, fusion = blake2b(digest_size=16), blake2b(digest_size=16), ""
        for request, prompts in self._requests(way):
            if len(prompts) > 1:
                fusion = str(way.fusion)
            for prompt in prompts:
                one, other = self._digests(way.contender, _without_names(prompt))
                tokens.update(one)
                segments.update(other)
                if not self._is_greedy:
                    drawn_for = request if way.fusion.is_of_logits else prompt
                    tokens.update(repr(drawn_for.key).encode())
        return _Prompts(fusion, tokens.digest(), segments.digest())

    def _find_digests(self, contender: Contender, prompt: Request) -> tuple[bytes, bytes]:
        layout = contender.strategy.layout(self._tokenized(prompt))
        choices = chain.from_iterable((len(each), *each) for each in self._choices(prompt))
        tokens = array("q", (*layout.token_ids, *layout.position_ids, *choices))
        return blake2b(tokens, digest_size=16).digest(), layout.digest

    def _requests(self, way: Way) -> Iterator[tuple[Request, list[Request]]]:
        """Yield each request that gets a generation, with its prompts."""
        for request in self._requests_of[way.num_segments]:
            if isinstance(request, Request):
                yield from way.fusion.prompts(request)

    def _masks_are_equal(self, way: Way, other: Way) -> bool:
        prompts = [prompt for _, some in self._requests(way) for prompt in some]
        others = [prompt for _, some in self._requests(other) for prompt in some]
        return all(
            self._are_equal_masks(
                (way.contender, prompts[start : start + PROMPTS_AT_ONCE]),
                (other.contender, others[start : start + PROMPTS_AT_ONCE]),
            )
            for start in range(0, len(prompts), PROMPTS_AT_ONCE)
        )

    def _are_equal_masks(self, *sides: tuple[Contender, Sequence[Request]]) -> bool:
        masks, rows, size = [], 0, 0
        for contender, prompts in sides:
            strategy = contender.strategy
            nameless = list(map(_without_names, prompts))
            layouts = [strategy.layout(self._tokenized(prompt)) for prompt in nameless]
            lengths = [len(layout) for layout in layouts]
            choices = chain.from_iterable(map(self._choices, nameless))
            longest = max(map(len, choices), default=self._max_new_tokens)
            rows, size = len(layouts), max(lengths) + longest
            batch = LayoutBatch(rows, size, CPU)
            batch.load(layouts, lengths, [0] * rows)
            batch.open_tail(lengths)
            if strategy.changes_scores(batch):
                return False
            masks.append(strategy_mask(strategy, batch))
        return masks_are_equal(masks[0], masks[1], rows, size, size, CPU)


def _without_names(prompt: Request) -> Request:
    """Return a prompt that equals every other one of the same texts."""
    return replace(prompt, uuid="", answers=(), answer=None, weights=(), segment=None)


def _cell(group: Sequence[Way], ways: Sequence[Way]) -> Cell:
    """Make the cell of a group of equal ways.

    If the group contains a fusion with every strategy, its name has no strategy.
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
