"""The tokens along both axes of a picture: what they read, and to what they belong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from flexmask.layout import PREFIX, TAIL, Layout, TokenizedRequest
from flexmask.strategy import Strategy

PLACEHOLDER = 5
"""Stands for every token of a request of which only lengths are known."""


@dataclass(frozen=True)
class ShownRequest:
    """A request to draw, and what is generated for it.

    Attributes:
        tokens: The request's token ids.
        new_tokens: How many tokens are generated after the prompt.
        text_of: Text of a token id; None where only lengths are known.
        new_texts: Text of each generated token, where there is a generation.
    """

    tokens: TokenizedRequest
    new_tokens: int = 0
    text_of: Callable[[int], str] | None = None
    new_texts: tuple[str, ...] = ()

    @classmethod
    def of_lengths(
        cls, prefix: int, segments: Sequence[int], suffix: int, new_tokens: int = 0
    ) -> ShownRequest:
        """A request of which only lengths are known: a mask depends on nothing else."""
        token = (PLACEHOLDER,)
        bodies = tuple(token * length for length in segments)
        return cls(TokenizedRequest(token * prefix, bodies, token * suffix), new_tokens)


@dataclass(frozen=True)
class Band:
    """A run of tokens of one part: drawn in one colour, with one label.

    Attributes:
        label: ``P``, ``S1``, ``S2``, …, ``T``, and ``G`` for what is generated.
        segment_id: As in a layout.
        start: Its first token.
        stop: The token after its last.
    """

    label: str
    segment_id: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_generated(self) -> bool:
        """Whether its tokens are generated ones."""
        return self.label == "G"


@dataclass(frozen=True)
class DrawnTokens:
    """Tokens in the order in which they are drawn.

    Attributes:
        segment_ids: Part of each, as in a layout; generated ones are `TAIL`.
        position_ids: Position of each.
        prompt_tokens: How many stand there before generation.
        texts: What each reads; empty where only lengths are known.
        origins: The number, in the request, of the token that each is a copy of: prefix,
            segments, tail and generated tokens are counted in this order. Empty where the
            strategy arranges tokens by their ids, so that copies cannot be told.
    """

    segment_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    prompt_tokens: int
    texts: tuple[str, ...] = ()
    origins: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.segment_ids)

    @classmethod
    def of_layout(cls, layout: Layout) -> DrawnTokens:
        """The tokens of a layout, without texts."""
        return cls(layout.segment_ids, layout.position_ids, len(layout))

    @classmethod
    def of_request(cls, strategy: Strategy, layout: Layout, shown: ShownRequest) -> DrawnTokens:
        """The tokens of a request as a strategy lays them out, generated ones included."""
        grown = layout.extended(shown.new_tokens) if shown.new_tokens else layout
        texts: tuple[str, ...] = ()
        if shown.text_of is not None:
            new = (*shown.new_texts, *("",) * shown.new_tokens)[: shown.new_tokens]
            texts = (*map(shown.text_of, layout.token_ids), *new)
        return cls(
            segment_ids=grown.segment_ids,
            position_ids=grown.position_ids,
            prompt_tokens=len(layout),
            texts=texts,
            origins=_origins(strategy, layout, shown),
        )

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """The parts, in order."""
        keys = [
            (segment_id, slot >= self.prompt_tokens)
            for slot, segment_id in enumerate(self.segment_ids)
        ]
        runs = [(key, len(list(group))) for key, group in groupby(keys)]
        stops = accumulate(length for _, length in runs)
        return tuple(
            Band(_label(*key), key[0], stop - length, stop)
            for (key, length), stop in zip(runs, stops, strict=True)
        )

    @property
    def tail_start(self) -> int:
        """The first token of the fusion tail; the number of tokens where there is none."""
        return next((b.start for b in self.bands if b.segment_id == TAIL), len(self))


def _label(segment_id: int, is_generated: bool) -> str:
    if is_generated:
        return "G"
    return {PREFIX: "P", TAIL: "T"}.get(segment_id, f"S{segment_id}")


def _origins(strategy: Strategy, layout: Layout, shown: ShownRequest) -> tuple[int, ...]:
    """Find which token of the request each slot holds, by laying out numbers in their place."""
    tokens = shown.tokens
    parts, start = [], 0
    for part in (tokens.prefix, *tokens.segments, tokens.tail):
        parts.append(tuple(range(start, start + len(part))))
        start += len(part)
    numbered = strategy.layout(TokenizedRequest(parts[0], tuple(parts[1:-1]), parts[-1]))
    if numbered.digest != layout.digest:
        return ()
    return (*numbered.token_ids, *range(start, start + shown.new_tokens))
