"""The sampler: chooses the next token of each row from its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flexmask.engine.row_loading import load_rows
from flexmask.sampling import Sampling

NUM_CHUNKS = 128

NOT_FINITE = -1
"""Stands for the token of a row whose largest logit is NaN or infinity."""

NO_TOKEN = -2
"""Stands for the token of a row whose logits are all minus infinity."""


class Sampler:
    """Chooses tokens for the rows of a batch; the decode loop makes it.

    Its buffers stay in place, so a captured step can use it.

    Attributes:
        is_greedy: True if the most likely token is chosen.
    """

    def __init__(
        self, sampling: Sampling, batch_size: int, max_new_tokens: int, device: torch.device
    ) -> None:
        """Allocate the buffers for batches of ``batch_size`` rows."""
        self.is_greedy = sampling.is_greedy
        self._sampling = sampling
        self._warpers = LogitsProcessorList()
        if sampling.is_greedy:
            return
        if sampling.temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._uniforms = torch.zeros(
            batch_size, max_new_tokens, dtype=torch.float64, device=device
        )

    def load(self, rows: Sequence[int], seeds: Sequence[str]) -> None:
        """Draw the random numbers of some rows: one uniform per row and token.

        Args:
            rows: The rows.
            seeds: One per row; rows with the same one draw alike.
        """
        if self.is_greedy:
            return
        count = self._uniforms.shape[1]
        drawn = [_uniforms(self._sampling.seed, seed, count) for seed in seeds]
        load_rows(self._uniforms, rows, torch.stack(drawn))

    def __call__(self, logits: Tensor, steps: Tensor) -> Tensor:
        """Choose one token per row.

        Args:
            logits: ``(B, V)``.
            steps: ``(B, 1)`` number of the token within each generation; beyond the last one, the
                choice has no meaning.

        Returns:
            Token ids ``(B, 1)``; `NOT_FINITE` or `NO_TOKEN` where no token can be chosen.
        """
        if self.is_greedy:
            return most_likely(logits)
        no_tokens = logits.new_zeros(len(logits), 0, dtype=torch.long)  # warpers look at scores
        scores = self._warpers(cast(torch.LongTensor, no_tokens), logits.float())
        cumulative = scores.double().softmax(-1).cumsum(-1)
        last = self._uniforms.shape[1] - 1
        targets = self._uniforms.gather(1, steps.clamp(max=last)) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, targets, right=True)
        chosen = chosen.clamp(max=logits.shape[-1] - 1)
        return _where_finite(logits.amax(-1, keepdim=True), chosen)


def most_likely(logits: Tensor) -> Tensor:
    """Take the argmax in two steps, because torch gives a row of logits to few programs on CUDA.

    Args:
        logits: ``(B, V)``.

    Returns:
        Token ids ``(B, 1)``; `NOT_FINITE` or `NO_TOKEN` where no token can be chosen.
    """
    batch_size, vocab_size = logits.shape
    chunks = math.gcd(vocab_size, NUM_CHUNKS)
    largest, index = logits.view(batch_size, chunks, -1).max(-1)
    chunk = largest.argmax(-1, keepdim=True)
    chosen = chunk * (vocab_size // chunks) + index.gather(1, chunk)
    return _where_finite(largest.amax(-1, keepdim=True), chosen)


def _where_finite(largest: Tensor, chosen: Tensor) -> Tensor:
    """Keep the chosen token of each row whose largest logit is finite.

    The maximum of a row is NaN if any logit is, so it suffices to look at that. Single logits may
    be minus infinity: so models and processors exclude tokens.
    """
    unusable = torch.where(largest == -torch.inf, NO_TOKEN, NOT_FINITE)
    return torch.where(largest.isfinite(), chosen, unusable)


def _uniforms(seed: int, row_seed: str, count: int) -> Tensor:
    digest = blake2b(f"{seed}:{row_seed}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)
