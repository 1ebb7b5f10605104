"""The tokens along the axes of a picture: their texts, positions and parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from flexmask.layout import PREFIX, TAIL, Layout, TokenizedRequest
from flexmask.strategy import Strategy

PLACEHOLDER = 5
"""Token id used for all tokens of a request of which only lengths are known."""


@dataclass(frozen=True)
class ShownRequest:
    """A request to draw, with the tokens generated for it.

    Attributes:
        tokens: The request's token ids.
        new_tokens: Number of tokens generated after the prompt.
        text_of: Returns the text of a token id; None if only lengths are known.
        new_texts: Text of each generated token; empty without a generation.
    """

    tokens: TokenizedRequest
    new_tokens: int = 0
    text_of: Callable[[int], str] | None = None
    new_texts: tuple[str, ...] = ()

    @classmethod
    def of_lengths(
        cls, prefix: int, segments: Sequence[int], suffix: int, new_tokens: int = 0
    ) -> ShownRequest:
        """Make a request of placeholder tokens; a mask depends on lengths only."""
        token = (PLACEHOLDER,)
        bodies = tuple(token * length for length in segments)
        return cls(TokenizedRequest(token * prefix, bodies, token * suffix), new_tokens)


@dataclass(frozen=True)
class Band:
    """Consecutive tokens of one part, drawn in one colour with one label.

    Attributes:
        label: ``P``, ``S1``, ``S2``, …, ``T``, and ``G`` for generated tokens.
        segment_id: Segment id, as in a layout.
        start: Index of the first token.
        stop: Index after the last token.
    """

    label: str
    segment_id: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_generated(self) -> bool:
        """True if its tokens are generated."""
        return self.label == "G"


@dataclass(frozen=True)
class DrawnTokens:
    """Tokens in the order in which they are drawn.

    Attributes:
        segment_ids: Segment id of each token, as in a layout; `TAIL` for generated ones.
        position_ids: Position of each token.
        prompt_tokens: Number of tokens before generation.
        texts: Text of each token; empty if only lengths are known.
        origins: Index, in the request, of the token that each is a copy of, counting prefix,
            segments, tail and generated tokens in this order. Empty if the strategy arranges
            tokens by their ids, so that copies cannot be identified.
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
        """Make the tokens of a layout, without texts."""
        return cls(layout.segment_ids, layout.position_ids, len(layout))

    @classmethod
    def of_request(cls, strategy: Strategy, layout: Layout, shown: ShownRequest) -> DrawnTokens:
        """Make the tokens of a request in a strategy's layout, including generated ones."""
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
        lengths = [(key, len(list(group))) for key, group in groupby(keys)]
        stops = accumulate(length for _, length in lengths)
        return tuple(
            Band(_label(*key), key[0], stop - length, stop)
            for (key, length), stop in zip(lengths, stops, strict=True)
        )

    @property
    def tail_start(self) -> int:
        """Index of the first token of the fusion tail; the number of tokens if there is none."""
        return next((b.start for b in self.bands if b.segment_id == TAIL), len(self))


def _label(segment_id: int, is_generated: bool) -> str:
    if is_generated:
        return "G"
    return {PREFIX: "P", TAIL: "T"}.get(segment_id, f"S{segment_id}")


def _origins(strategy: Strategy, layout: Layout, shown: ShownRequest) -> tuple[int, ...]:
    """Find the token of the request that each slot holds, by laying out indices as token ids."""
    tokens = shown.tokens
    parts, start = [], 0
    for part in (tokens.prefix, *tokens.segments, tokens.tail):
        parts.append(tuple(range(start, start + len(part))))
        start += len(part)
    numbered = strategy.layout(TokenizedRequest(parts[0], tuple(parts[1:-1]), parts[-1]))
    if numbered.digest != layout.digest:
        return ()
    return (*numbered.token_ids, *range(start, start + shown.new_tokens))
