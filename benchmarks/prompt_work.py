"""The least work for the prompts of a run; its time is the floor that times are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from flexmask import Strategy, TokenizedRequest
from flexmask.bench.floors import ModelCost, Rates
from flexmask.errors import OptionError


@dataclass(frozen=True)
class PromptWork:
    """The least work for prompts that run together.

    A token is computed once for all prompts and segments that begin alike up to it: the shared
    prefix of a data set, its copies in the segments of a request, equal first words.

    Attributes:
        rows: Number of prompts.
        tokens: Tokens to compute, whose keys every decode step reads.
        pairs: Pairs of a computed token and a key that it sees.
        keys_seen: Keys that the last token of each prompt sees, summed.
    """

    rows: int
    tokens: int
    pairs: int
    keys_seen: int

    @classmethod
    def of(cls, strategy: Strategy, requests: Sequence[TokenizedRequest]) -> Self:
        """Return the work under a strategy.

        Raises:
            OptionError: If the strategy is neither causal nor isolates segments behind a prefix.
        """
        if strategy.name == "causal":
            return cls._causal([_joined(r.prefix, *r.segments, r.tail) for r in requests])
        if strategy.name in ("ensemble_isolation", "prefix_segment"):
            return cls._isolated(requests)
        raise OptionError(f"the floor of strategy {strategy.name!r} is not known")

    @classmethod
    def _causal(cls, prompts: Sequence[tuple[int, ...]]) -> Self:
        return cls(len(prompts), *_distinct(prompts), sum(map(len, prompts)))

    @classmethod
    def _isolated(cls, requests: Sequence[TokenizedRequest]) -> Self:
        beginnings = [_joined(r.prefix, segment) for r in requests for segment in r.segments]
        tokens, pairs = _distinct(beginnings)
        keys_seen = 0
        for request in requests:
            before, _ = _distinct(_joined(request.prefix, own) for own in request.segments)
            tail = len(request.tail)
            tokens += tail
            pairs += tail * before + tail * (tail + 1) // 2
            keys_seen += before + tail
        return cls(len(requests), tokens, pairs, keys_seen)

    def prefill_s(self, cost: ModelCost, rates: Rates) -> float:
        """Return the floor of the first token of every prompt.

        The last token of a prompt goes through the whole model, all before it through the layers
        up to the last one's keys and values.
        """
        flops = cost.keys_flops(self.tokens, self.pairs)
        flops += min(self.rows, self.tokens) * cost.last_token_flops
        flops += min(self.keys_seen, self.pairs) * cost.last_pair_flops
        return rates.seconds(cost.weight_bytes, flops + self.rows * cost.logits_flops)

    def decode_s(self, cost: ModelCost, rates: Rates, steps: int) -> float:
        """Return the floor of ``steps`` tokens more for every prompt, all in one batch."""
        return sum(
            cost.decode_step_s(
                self.rows, self.tokens + self.rows * step, self.keys_seen + self.rows * step, rates
            )
            for step in range(1, steps + 1)
        )


def _joined(*parts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(token for part in parts for token in part)


def _distinct(sequences: Iterable[tuple[int, ...]]) -> tuple[int, int]:
    """Count the distinct beginnings of sequences, and the tokens of all these beginnings.

    Example:
        ``a b c`` and ``a b d`` have four beginnings (a, ab, abc, abd) of 1 + 2 + 3 + 3 tokens.
    """
    count = tokens = 0
    for before, one in pairwise([(), *sorted(sequences)]):
        shared = _common_length(before, one)
        count += len(one) - shared
        tokens += _triangle(len(one)) - _triangle(shared)
    return count, tokens


def _common_length(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _triangle(count: int) -> int:
    return count * (count + 1) // 2
