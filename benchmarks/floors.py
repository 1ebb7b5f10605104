"""Floors of generation: the least time that a model takes on a machine of measured rates.

Prefill costs the matrix products of the tokens that must be computed and the attention of the
pairs that the mask allows. A decode step reads all weights once and every key and value once, and
computes the products of its rows. Of reading and computing the floor is the longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from flexmask import Strategy, TokenizedRequest
from flexmask.bench.machine import matrix_rate, read_bandwidth
from flexmask.errors import OptionError


@dataclass(frozen=True)
class Rates:
    """Peak rates of a machine.

    Attributes:
        bytes_per_s: Bytes read per second.
        flops_per_s: Operations per second of a large matrix product.
    """

    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Self:
        """Measure them; the memory this takes is free afterwards."""
        rates = cls(read_bandwidth(device), matrix_rate(device, dtype))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return rates

    def seconds(self, num_bytes: float, flops: float) -> float:
        """Return the time to read bytes and to compute, at once."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)

    def __str__(self) -> str:
        """Return them in words."""
        return f"{self.bytes_per_s / 1e9:,.0f} GB/s, {self.flops_per_s / 1e9:,.0f} GFLOP/s"


@dataclass(frozen=True)
class ModelCost:
    """Bytes and operations of a model.

    Attributes:
        weight_bytes: Weights that every step reads.
        slot_bytes: Key and value of one token in all layers.
        token_flops: Matrix products of one token, without its logits.
        logits_flops: The product that makes the logits of one token.
        pair_flops: Attention from one token to one key in all layers.
    """

    weight_bytes: int
    slot_bytes: int
    token_flops: int
    logits_flops: int
    pair_flops: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Read the cost off a model, which may be on the meta device."""
        config, itemsize = model.config, model.dtype.itemsize
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()  # to mypy a module may be a tensor
        weights = list(model.parameters())
        if head.weight is not embedding.weight:
            weights = [weight for weight in weights if weight is not embedding.weight]
        read = sum(weight.numel() for weight in weights)
        layers, dim = config.num_hidden_layers, config.head_dim
        return cls(
            weight_bytes=sum(weight.numel() * weight.itemsize for weight in weights),
            slot_bytes=2 * layers * config.num_key_value_heads * dim * itemsize,
            token_flops=2 * (read - head.weight.numel()),
            logits_flops=2 * head.weight.numel(),
            pair_flops=4 * layers * config.num_attention_heads * dim,
        )

    def decode_step_s(self, rows: int, keys: int, pairs: int, rates: Rates) -> float:
        """Return the floor of a step.

        Args:
            rows: Prompts that get a token.
            keys: Keys to read; one that several prompts share counts once.
            pairs: Keys that each prompt sees, summed over the prompts.
            rates: Rates of the machine.
        """
        flops = rows * (self.token_flops + self.logits_flops) + pairs * self.pair_flops
        return rates.seconds(self.weight_bytes + keys * self.slot_bytes, flops)


@dataclass(frozen=True)
class PromptWork:
    """The least work for prompts that run together.

    A token is computed once for all prompts and segments that begin alike up to it: the shared
    prefix of a data set, its copies in the segments of a request, equal first words.

    Attributes:
        rows: Number of prompts.
        tokens: Tokens to compute, whose keys every decode step reads.
        pairs: Pairs of a computed token and a key that it sees.
        keys_seen: Keys that the first generated token of each prompt sees, summed.
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
        """Return the floor of the first token of every prompt."""
        flops = self.tokens * cost.token_flops + self.pairs * cost.pair_flops
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
