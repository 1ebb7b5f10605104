"""The scores of the choices of a request: how likely each of them is after its prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flexmask.errors import OptionError
from flexmask.request import Request

Normalize = Literal["none", "tokens", "bytes"]
"""The divisor of a choice's log-probability before choices are compared: none, its number of
tokens, or its number of bytes in UTF-8."""

NORMALIZATIONS: tuple[Normalize, ...] = ("none", "tokens", "bytes")


@dataclass(frozen=True)
class ChoiceScore:
    """The score of one choice.

    Attributes:
        text: The choice.
        token_ids: Its tokens.
        token_logprobs: For each token the natural logarithm of its probability after the prompt
            and the tokens before it.
        is_greedy: True if greedy decoding would have generated exactly these tokens; None where
            prompts are fused, since no single distribution was decoded from.
    """

    text: str
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    is_greedy: bool | None

    @property
    def logprob(self) -> float:
        """The natural logarithm of the probability of the choice: the sum over its tokens."""
        return math.fsum(self.token_logprobs)

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.token_logprobs)

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the text in UTF-8."""
        return len(self.text.encode())

    def value(self, normalize: Normalize) -> float:
        """Return the number by which choices are compared; the highest wins."""
        if normalize == "tokens":
            return self.logprob / self.num_tokens
        return self.logprob / self.num_bytes if normalize == "bytes" else self.logprob


@dataclass(frozen=True)
class Score:
    """The scores of the choices of one request; `flexmask.Engine.score` makes it.

    Attributes:
        request: The request.
        choices: The score of each choice, in the order of ``request.choices``.
        prompt_tokens: Slots of its prompts, copies of the prefix included, choices not.
    """

    request: Request
    choices: tuple[ChoiceScore, ...]
    prompt_tokens: int

    def chosen(self, normalize: Normalize = "none") -> int:
        """Return the index of the choice with the highest value; of equal ones the first."""
        values = [choice.value(normalize) for choice in self.choices]
        return values.index(max(values))

    def is_tie(self, normalize: Normalize = "none") -> bool:
        """Return True if another choice has the same value as the chosen one."""
        values = [choice.value(normalize) for choice in self.choices]
        return values.count(max(values)) > 1


def check_normalization(name: str) -> Normalize:
    """Return a normalization by its name.

    Raises:
        OptionError: If there is none of that name.
    """
    for known in NORMALIZATIONS:
        if name == known:
            return known
    raise OptionError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, got {name!r}")


def fused_scores(
    of_prompts: Sequence[Sequence[ChoiceScore]], fusion: str
) -> tuple[ChoiceScore, ...]:
    """Fuse the scores that several prompts give the same choices.

    Args:
        of_prompts: For each prompt the scores of all choices.
        fusion: ``mean`` averages log-probabilities. ``mean_prob`` averages probabilities: those
            of a choice's first token, of its first two, and so on, as if one of the prompts had
            been drawn at random.
    """
    fuse = _mean_logprobs if fusion == "mean" else _mean_probs
    return tuple(
        replace(scores[0], token_logprobs=fuse(scores), is_greedy=None)
        for scores in zip(*of_prompts, strict=True)
    )


def _mean_logprobs(scores: Sequence[ChoiceScore]) -> tuple[float, ...]:
    columns = zip(*(score.token_logprobs for score in scores), strict=True)
    return tuple(math.fsum(column) / len(scores) for column in columns)


def _mean_probs(scores: Sequence[ChoiceScore]) -> tuple[float, ...]:
    so_far = [0.0] * len(scores)
    fused, before = [], 0.0
    for column in zip(*(score.token_logprobs for score in scores), strict=True):
        so_far = [total + logprob for total, logprob in zip(so_far, column, strict=True)]
        mean = _log_of_mean(so_far)
        fused.append(mean - before if before > -math.inf else -math.inf)
        before = mean
    return tuple(fused)


def _log_of_mean(logarithms: Sequence[float]) -> float:
    """Return the logarithm of the mean of numbers, given their logarithms."""
    largest = max(logarithms)
    if largest == -math.inf:
        return largest
    total = math.fsum(math.exp(value - largest) for value in logarithms)
    return largest + math.log(total / len(logarithms))
