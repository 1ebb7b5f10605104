"""Decides which tokens of a prefill are computed, and which are written from others or copied."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flexmask.engine.prefix_cache import MIN_PREFIX_TOKENS, common_length
from flexmask.engine.prompt_spans import Span, SpanFinder, span_identity
from flexmask.layout import TAIL, Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.int32]

COMPUTED, COPIED, SHARED = -1, -2, -3


@dataclass(frozen=True)
class PromptSpans:
    """A prompt in a batch row, and what is known of its spans.

    Attributes:
        row: The batch row.
        layout: The prompt.
        count: Tokens whose keys and values are needed: all but the last.
        spans: Its spans.
        identities: The identity of each span.
        wanted: Indices of the spans that are computed, and nothing else of the prompt but what
            they see; None for the whole prompt.
        stored: Indices of those that a store has, and does not get again.
    """

    row: int
    layout: Layout
    count: int
    spans: tuple[Span, ...]
    identities: tuple[bytes, ...]
    wanted: frozenset[int] | None = None
    stored: frozenset[int] = frozenset()

    @cached_property
    def placed_identities(self) -> tuple[tuple[bytes, int], ...]:
        """Identity and first position of each span; equal ones have equal keys and values."""
        return tuple(zip(self.identities, map(self.first_position, self.spans), strict=True))

    @cached_property
    def needed(self) -> tuple[int, ...]:
        """Indices of the spans whose keys and values the row must have, in ascending order."""
        if self.wanted is None:
            return tuple(range(len(self.spans)))
        needed = set(self.wanted)
        for index in reversed(range(len(self.spans))):
            if index in needed:
                needed.update(self.spans[index].ancestors)
        return tuple(sorted(needed))

    def needed_among(self, identities: Container[bytes]) -> frozenset[int]:
        """Return the indices of the needed spans that have one of these identities."""
        return frozenset(index for index in self.needed if self.identities[index] in identities)

    @cached_property
    def left_out(self) -> list[tuple[int, int]]:
        """The slots whose keys and values the row need not have, as ``(start, stop)``."""
        if self.wanted is None:
            return []
        ranges, reached = [], 0
        needed = [(self.spans[index].start, self.spans[index].stop) for index in self.needed]
        for start, stop in (*needed, (self.count, self.count)):
            if reached < start:
                ranges.append((reached, start))
            reached = stop
        return ranges

    def is_storable(self, index: int) -> bool:
        """Return True if a span is worth a place in a store: long enough, and not of the tail."""
        span = self.spans[index]
        is_tail = self.layout.segment_ids[span.start] == TAIL
        return not is_tail and span.stop - span.start >= MIN_PREFIX_TOKENS

    def first_position(self, span: Span) -> int:
        """Position of the first token of a span."""
        return self.layout.position_ids[span.start]

    def is_closed(self, start: int, length: int) -> bool:
        """Return True if tokens from a slot on are proved to see themselves only, causally."""
        stop = start + length
        inside = [
            (index, span) for index, span in enumerate(self.spans) if start <= span.start < stop
        ]
        seen: list[int] = []
        reached = start
        for index, span in inside:
            if span.start != reached or list(span.ancestors) != seen:
                return False
            seen.append(index)
            reached = span.stop
        return reached >= stop


def known_spans(
    finder: SpanFinder, prompts: Mapping[int, Layout], *, at_own_position: bool
) -> list[PromptSpans]:
    """Find and identify the spans of prompts, of each without its last token.

    Args:
        finder: Finds them.
        prompts: The layout of each prompt, by batch row.
        at_own_position: True if they are reused at their own position only.
    """
    known = []
    spans_of = finder.spans_of(list(prompts.values()))
    for (row, layout), spans in zip(prompts.items(), spans_of, strict=True):
        identities: dict[int, bytes] = {}
        for index in range(len(spans)):
            identities[index] = span_identity(
                layout, spans, index, identities, at_own_position=at_own_position
            )
        values = tuple(identities.values())
        known.append(PromptSpans(row, layout, len(layout) - 1, spans, values))
    return known


@dataclass(frozen=True)
class RowPart:
    """The part of a prefill for one row.

    Attributes:
        slots: Slots of the tokens to compute.
        tokens: For each slot of the prompt the token of the stream that is written to it;
            `COPIED` where keys and values are copied.
    """

    slots: Numbers
    tokens: Numbers


class _Shared(NamedTuple):
    """Tokens that are computed in another place: ``length`` of them, from a slot on in both."""

    prompt: int
    start: int
    donor: int
    donor_start: int
    length: int

    def received(self, tokens: Sequence[Numbers]) -> Numbers:
        """View what is written to these slots."""
        return tokens[self.prompt][self.start : self.start + self.length]

    def donated(self, tokens: Sequence[Numbers]) -> Numbers:
        """View what is written to the slots of the donor."""
        return tokens[self.donor][self.donor_start : self.donor_start + self.length]


def divide(
    prompts: Sequence[PromptSpans], copied: Sequence[Sequence[tuple[int, int]]]
) -> list[RowPart]:
    """Divide prompts into tokens to compute, and those that are written from others.

    Equal prompts are computed once. So are equal spans at equal positions, wherever they stand, in
    several prompts or several times in one, and the first tokens that spans have in common.

    Args:
        prompts: The prompts.
        copied: For each prompt the slots whose keys and values are copied, as ``(start, stop)``.
    """
    tokens = [np.full(prompt.count, COMPUTED, np.int32) for prompt in prompts]
    for of_row, ranges in zip(tokens, copied, strict=True):
        for start, stop in ranges:
            of_row[start:stop] = COPIED
    equal = _equal_prompts(prompts, copied)
    whole, first = _equal_spans(prompts, tokens, {one.prompt for one in equal})
    shared = [
        one
        for one in _common_beginnings(prompts, tokens, first) + whole + equal
        if not np.any((one.donated(tokens) == COPIED) & (one.received(tokens) != COPIED))
    ]
    for one in shared:
        received = one.received(tokens)
        received[received == COMPUTED] = SHARED
    slots = [np.flatnonzero(of_row == COMPUTED).astype(np.int32) for of_row in tokens]
    done = 0
    for of_row, own in zip(tokens, slots, strict=True):
        of_row[own] = np.arange(done, done + len(own))
        done += len(own)
    for one in shared:
        received = one.received(tokens)
        np.copyto(received, one.donated(tokens), where=received == SHARED)
    return [RowPart(own, of_row) for own, of_row in zip(slots, tokens, strict=True)]


def _equal_prompts(
    prompts: Sequence[PromptSpans], copied: Sequence[Sequence[tuple[int, int]]]
) -> list[_Shared]:
    """Find prompts that occurred before; what their tokens see is the same under any mask.

    A prompt of which other slots are copied does not count.
    """
    first: dict[object, int] = {}
    again = []
    for number, (prompt, ranges) in enumerate(zip(prompts, copied, strict=True)):
        key = prompt.layout.digest, prompt.layout.token_ids, tuple(ranges)
        donor = first.setdefault(key, number)
        if donor != number:
            again.append(_Shared(number, 0, donor, 0, prompt.count))
    return again


def _equal_spans(
    prompts: Sequence[PromptSpans], tokens: Sequence[Numbers], left_out: Container[int]
) -> tuple[list[_Shared], list[tuple[int, int]]]:
    """Find spans that occurred before; also returns those that occur for the first time.

    Those of prompts that are left out do not count, nor spans that are copied anyway.
    """
    first: dict[tuple[bytes, int], tuple[int, int]] = {}
    again = []
    for number, prompt in enumerate(prompts):
        for index, span in enumerate(() if number in left_out else prompt.spans):
            if tokens[number][span.stop - 1] == COPIED:
                continue
            key = prompt.placed_identities[index]
            if key in first:
                donor, donor_index = first[key]
                start = prompts[donor].spans[donor_index].start
                length = span.stop - span.start
                again.append(_Shared(number, span.start, donor, start, length))
            else:
                first[key] = number, index
    return again, [*first.values()]


def _common_beginnings(
    prompts: Sequence[PromptSpans],
    tokens: Sequence[Numbers],
    spans: Sequence[tuple[int, int]],
) -> list[_Shared]:
    """Find for each span the longest beginning that another one with the same ancestors has too.

    Sorted by their tokens, a span shares most with its neighbours, as in a tree of prefixes. The
    donor of each comes before it in the list, or shares nothing itself. Where the first tokens
    are copied, spans with the same ones are compared from there on.
    """
    groups: dict[object, list[tuple[tuple[int, ...], int, int]]] = {}
    for number, index in spans:
        prompt = prompts[number]
        span = prompt.spans[index]
        first = span.start + int(np.argmax(tokens[number][span.start : span.stop] != COPIED))
        if span.stop - first < MIN_PREFIX_TOKENS:
            continue
        ancestors = tuple(prompt.placed_identities[ancestor] for ancestor in span.ancestors)
        copied = prompt.layout.token_ids[span.start : first]
        members = groups.setdefault((ancestors, prompt.first_position(span), copied), [])
        members.append((prompt.layout.token_ids[first : span.stop], number, first))
    shared = []
    for members in groups.values():
        for (theirs, donor, donor_start), (ours, number, start) in pairwise(sorted(members)):
            if ours[:MIN_PREFIX_TOKENS] != theirs[:MIN_PREFIX_TOKENS]:
                continue  # most spans, and comparing these few tokens is fast
            length = common_length(ours, theirs)
            if length >= MIN_PREFIX_TOKENS:
                shared.append(_Shared(number, start, donor, donor_start, length))
    return shared
