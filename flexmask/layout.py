"""Layouts: the token-level plan of one request.

Example:
    A prefix of two tokens, segments of three and two, a fusion tail of one. Shared prefix and
    restarted positions, as ``prefix_segment`` lays it out::

        slot           0  1 | 2  3  4 | 5  6 | 7
        segment_ids    0  0 | 1  1  1 | 2  2 | -1
        position_ids   0  1 | 2  3  4 | 2  3 | 5

    Each segment starts where the prefix ends; the tail continues after the longest segment.
    With the prefix copied to the head of each segment, as ``ensemble_isolation`` has it::

        slot           0  1  2  3  4 | 5  6  7  8 | 9
        segment_ids    1  1  1  1  1 | 2  2  2  2 | -1
        position_ids   0  1  2  3  4 | 0  1  2  3 | 5

    The first layout with choices of two and one tokens, each of which continues the prompt::

        slot           0  1 | 2  3  4 | 5  6 | 7 | 8  9 | 10
        segment_ids    0  0 | 1  1  1 | 2  2 | -1| -1 -1| -1
        position_ids   0  1 | 2  3  4 | 2  3 | 5 | 6  7 | 6
        choice_ids     0  0 | 0  0  0 | 0  0 | 0 | 1  1 | 2
        tail_slots     0  1 | 2  3  4 | 5  6 | 7 | 8  9 | 8
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate, pairwise
from operator import add
from struct import pack_into
from typing import TYPE_CHECKING, Literal

from flexmask import display
from flexmask.errors import FlexMaskWarning, LayoutError, RequestError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from torch import Tensor

    Numbers = NDArray[np.int64]

PREFIX = 0
"""Segment id of prefix tokens; segments count from 1."""
TAIL = -1
"""Segment id of the fusion tail and of generated tokens."""
PADDING = -2
"""Segment id of slots that hold no token."""

Positions = Literal["restart", "sequential"]
"""``restart`` starts every segment where its prefix ends; ``sequential`` counts slots."""


@dataclass(frozen=True)
class TokenizedRequest:
    """The token ids of a request: prefix, segments and fusion tail.

    The fusion tail is never empty. The logits of the first generated token come from the last
    prompt token, so that token must see every segment.

    Attributes:
        prefix: Token ids before the segments.
        segments: Token ids of each segment.
        tail: Token ids of the fusion tail.
        special_text: Text of a special token that the request holds and that was tokenized as
            plain text; None where it holds none.
    """

    prefix: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    tail: tuple[int, ...]
    special_text: str | None = field(default=None, compare=False)

    @classmethod
    def from_token_ids(
        cls,
        prefix: Sequence[int],
        segments: Sequence[Sequence[int]],
        suffix: Sequence[int] = (),
    ) -> TokenizedRequest:
        """Make a tokenized request, and decide on its fusion tail.

        The tail is the suffix. Without a suffix it is the longest common ending of the segments in
        tokens, which is removed from each of them; if they have none, it is the last token of the
        last segment, with a warning. Every segment keeps at least one token.

        Args:
            prefix: Token ids, with the beginning-of-sequence token where the model has one.
            segments: Token ids of each segment.
            suffix: Token ids of the suffix.

        Raises:
            RequestError: If a segment has no tokens, or no token is left for the tail.
        """
        for number, segment in enumerate(segments, start=1):
            if not segment:
                raise RequestError(f"segment {number} has no tokens")
        bodies = [tuple(segment) for segment in segments]
        if suffix:
            return cls(tuple(prefix), tuple(bodies), tuple(suffix))
        common = 1 if len(bodies) == 1 else _common_suffix_length(bodies)
        if common and min(map(len, bodies)) > common:
            tail = bodies[0][-common:]
            return cls(tuple(prefix), tuple(body[:-common] for body in bodies), tail)
        *others, last = bodies
        if len(last) == 1:
            raise RequestError(
                f"segment {len(bodies)} is a single token and there is no suffix, so no token "
                "is left to fuse the segments; give the request a suffix"
            )
        warnings.warn(
            "the segments share no ending and the request has no suffix: the last token of the "
            "last segment fuses them; give the request a suffix",
            FlexMaskWarning,
            stacklevel=2,
        )
        return cls(tuple(prefix), (*others, last[:-1]), last[-1:])

    def with_copied_prefix(self) -> TokenizedRequest:
        """Return the request with a copy of its prefix in every segment, and no other prefix."""
        segments = tuple(self.prefix + segment for segment in self.segments)
        return TokenizedRequest((), segments, self.tail)


def _common_suffix_length(bodies: Sequence[tuple[int, ...]]) -> int:
    longest = min(map(len, bodies)) - 1  # a segment keeps at least one token
    for length in range(longest):
        if len({body[-1 - length] for body in bodies}) > 1:
            return length
    return longest


@dataclass(frozen=True)
class Layout:
    """The layout of a request: segment and position of every token, in storage order.

    Strategies make it (`flexmask.Strategy.layout`).

    Attributes:
        token_ids: ``S`` prompt tokens; the index of a token is its slot.
        segment_ids: `PREFIX`, the number of a segment from 1, or `TAIL`, for each token.
        position_ids: The position of each token, as rotary embeddings see it.
        choice_lengths: Number of tokens of each choice that continues the prompt, longest first.
            They are the last tokens (`with_choices`); empty for a prompt alone.

    Raises:
        LayoutError: If lengths differ, the fusion tail is missing or not at the end, or an id or
            a position is out of range.
    """

    token_ids: tuple[int, ...]
    segment_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    choice_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.segment_ids) == len(self.position_ids):
            raise LayoutError(
                f"{len(self.token_ids)} tokens, {len(self.segment_ids)} segment ids and "
                f"{len(self.position_ids)} positions: a layout needs one of each per token"
            )
        if not self.segment_ids or self.segment_ids[-1] != TAIL:
            raise LayoutError("a layout ends with at least one fusion-tail token")
        least = self.segment_array[: self.tail_start].min(initial=PREFIX)
        if least == TAIL:
            raise LayoutError("fusion-tail tokens must stand together at the end")
        if least < TAIL:
            raise LayoutError(f"segment ids must be at least {TAIL}, got {least}")
        if (least := self.position_array.min()) < 0:
            raise LayoutError(f"positions must not be negative, got {least}")
        if list(self.choice_lengths) != sorted(self.choice_lengths, reverse=True):
            raise LayoutError(f"choices are stored longest first, got {self.choice_lengths}")
        if self.choice_lengths and self.prompt_length <= self.tail_start:
            raise LayoutError("choices follow a prompt, whose tail has at least one token")

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def tail_start(self) -> int:
        """Slot of the first fusion-tail token."""
        start = len(self.segment_ids)
        while start and self.segment_ids[start - 1] == TAIL:
            start -= 1
        return start

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, without those of choices."""
        return len(self.token_ids) - sum(self.choice_lengths)

    @cached_property
    def num_segments(self) -> int:
        """Number of segments."""
        return max(max(self.segment_ids), 0)

    @property
    def next_position(self) -> int:
        """Position of the first generated token."""
        return self.position_ids[-1] + 1

    @cached_property
    def digest(self) -> bytes:
        """A digest of segment ids, positions and lengths of choices, 16 bytes.

        Token ids are left out, because a mask does not depend on them.
        """
        content = blake2b(digest_size=16)
        for values in (self.segment_array, self.position_array):
            content.update(values.tobytes())
        if self.choice_lengths:
            content.update(repr(self.choice_lengths).encode())
        return content.digest()

    @cached_property
    def token_array(self) -> Numbers:
        """`token_ids` as an array ``(S,)`` of int64."""
        return _array(self.token_ids)

    @cached_property
    def segment_array(self) -> Numbers:
        """`segment_ids` as an array ``(S,)`` of int64."""
        return _array(self.segment_ids)

    @cached_property
    def position_array(self) -> Numbers:
        """`position_ids` as an array ``(S,)`` of int64."""
        return _array(self.position_ids)

    @cached_property
    def index_array(self) -> Numbers:
        """The number of tokens of the same segment id before each token, ``(S,)`` int64."""
        import numpy as np

        ids = self.segment_array
        ends = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)]
        counts: Counter[int] = Counter()
        offsets = []
        for start, stop in pairwise(ends):
            offsets.append(counts[self.segment_ids[start]] - start)
            counts[self.segment_ids[start]] += stop - start
        indices: Numbers = np.arange(len(ids)) + np.repeat(offsets, np.diff(ends))
        return indices

    @cached_property
    def indices_in_segments(self) -> tuple[int, ...]:
        """The number of tokens of the same segment id before each token, for ``S`` tokens."""
        return tuple(self.index_array.tolist())

    @property
    def token_tensor(self) -> Tensor:
        """`token_ids` as a tensor ``(S,)`` of int64 on CPU."""
        return _tensor(self.token_array)

    @property
    def segment_tensor(self) -> Tensor:
        """`segment_ids` as a tensor ``(S,)`` of int64 on CPU."""
        return _tensor(self.segment_array)

    @property
    def position_tensor(self) -> Tensor:
        """`position_ids` as a tensor ``(S,)`` of int64 on CPU."""
        return _tensor(self.position_array)

    @cached_property
    def choice_array(self) -> Numbers:
        """The number of each token's choice, from 1, as ``(S,)`` int64; 0 in the prompt."""
        import numpy as np

        numbers = np.repeat(np.arange(1, len(self.choice_lengths) + 1), self.choice_lengths)
        return np.append(np.zeros(self.prompt_length, np.int64), numbers)

    @cached_property
    def tail_slot_array(self) -> Numbers:
        """The slot of each token if its choice were the only one, as ``(S,)`` int64."""
        import numpy as np

        prompt = self.prompt_length
        choices = (np.arange(prompt, prompt + length) for length in self.choice_lengths)
        return np.concatenate((np.arange(prompt), *choices))

    def with_choices(self, choices: Sequence[Sequence[int]]) -> Layout:
        """Return a prompt's layout with choices stored behind it, each of which continues it.

        Their positions all continue the prompt's, and slots from the prompt's end on hold the
        longest choice. So a strategy finds segment id and position of any choice's token at its
        slot of `tail_slot_array`.

        Args:
            choices: The tokens of each choice, longest first.

        Raises:
            LayoutError: If they are in another order.
        """
        lengths = tuple(map(len, choices))
        first = self.next_position
        return Layout(
            (*self.token_ids, *(token for choice in choices for token in choice)),
            (*self.segment_ids, *(TAIL,) * sum(lengths)),
            (*self.position_ids, *(first + n for length in lengths for n in range(length))),
            lengths,
        )

    def extended(self, num_tokens: int) -> Layout:
        """Return the layout with ``num_tokens`` generated tokens added, whose ids are 0."""
        generated = range(self.next_position, self.next_position + num_tokens)
        return Layout(
            (*self.token_ids, *(0,) * num_tokens),
            (*self.segment_ids, *(TAIL,) * num_tokens),
            (*self.position_ids, *generated),
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the position of every slot, with matplotlib (``flexmask[plot]``)."""
        return display.plot(self, ax)

    def _repr_html_(self) -> str:
        return display.html(self)


def _array(values: tuple[int, ...]) -> Numbers:
    import numpy as np

    # By struct, which takes less than half the time that numpy takes for a tuple.
    content = bytearray(8 * len(values))
    pack_into(f"{len(values)}q", content, 0, *values)
    return np.frombuffer(content, np.int64)


def _tensor(values: Numbers) -> Tensor:
    import torch

    return torch.from_numpy(values)


def shared_prefix_layout(request: TokenizedRequest, positions: Positions) -> Layout:
    """Lay out a request with one prefix, then the segments, then the tail.

    Args:
        request: The request.
        positions: ``restart`` starts every segment where the prefix ends; ``sequential`` counts
            slots.
    """
    if positions == "sequential":
        return placed_layout(request, consecutive_starts(request))
    return placed_layout(request, [len(request.prefix)] * len(request.segments))


def copied_prefix_layout(request: TokenizedRequest, positions: Positions) -> Layout:
    """Lay out a request with a copy of the prefix before every segment, then the tail.

    Args:
        request: The request.
        positions: ``restart`` starts every copy of the prefix at 0; ``sequential`` counts slots.
    """
    return shared_prefix_layout(request.with_copied_prefix(), positions)


def placed_layout(
    request: TokenizedRequest, starts: Sequence[int], tail_start: int | None = None
) -> Layout:
    """Lay out prefix, segments and tail in this order, at chosen positions.

    Args:
        request: The request; its prefix gets the positions 0, 1 and so on.
        starts: Position of the first token of each segment.
        tail_start: Position of the first token of the tail; None for the highest position so far
            plus one.
    """
    token_ids, segment_ids = list(request.prefix), [PREFIX] * len(request.prefix)
    position_ids = list(range(len(request.prefix)))
    for number, (segment, start) in enumerate(zip(request.segments, starts, strict=True), start=1):
        token_ids += segment
        segment_ids += [number] * len(segment)
        position_ids += range(start, start + len(segment))
    ends = map(add, starts, map(len, request.segments))
    first = max(len(request.prefix), *ends) if tail_start is None else tail_start
    token_ids += request.tail
    segment_ids += [TAIL] * len(request.tail)
    position_ids += range(first, first + len(request.tail))
    return Layout(tuple(token_ids), tuple(segment_ids), tuple(position_ids))


def consecutive_starts(request: TokenizedRequest) -> list[int]:
    """Return the position of the first token of each segment if positions count slots."""
    return list(accumulate(map(len, request.segments), initial=len(request.prefix)))[:-1]
