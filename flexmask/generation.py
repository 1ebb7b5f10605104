"""The generation of a request: its text, tokens and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from flexmask.request import Request

FinishReason = Literal["eos", "stop", "length"]
"""Why a generation ended: end-of-sequence token, stop string, or ``max_new_tokens`` reached."""

SegmentAttention = tuple[tuple[float, ...], ...]
"""For each generated token the shares of attention on the prefix, on each segment, and on the tail
with the tokens generated so far."""


class TokenLogprob(NamedTuple):
    """A token, and the natural logarithm of its probability.

    Attributes:
        token_id: The token.
        text: Its text; empty for most special tokens.
        logprob: The logarithm.
    """

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Generation:
    """The generation of one request; `flexmask.Engine` makes it.

    Attributes:
        request: The request that was generated for.
        text: Generated text up to the end-of-sequence token or stop string, without that.
        token_ids: Generated tokens, including the end-of-sequence token or stop string.
        finish_reason: Why it ended.
        prompt_tokens: Slots of its prompts, copies of the prefix included.
        prompts: The texts that a chat template made of its request; None without one.
        logprobs: For each token the natural logarithm of the probability that it was chosen by:
            after the generation config's processors and after fusion, before temperature, top-k
            and top-p. None unless asked for.
        top_logprobs: For each token the tokens that were most likely in its place, in descending
            order; those that cannot be chosen at all are left out. None unless asked for.
        segment_attention: Where the tokens that chose each of ``token_ids`` attended to, mean over
            heads and layers; each row sums to 1. A copy of the prefix belongs to its segment.
            None where it was not asked for.
    """

    request: Request
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    prompts: tuple[str, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    segment_attention: SegmentAttention | None = None

    @property
    def sample(self) -> int:
        """Its number, from 0, among the generations that continue one prompt."""
        return self.request.sample

    @property
    def prediction(self) -> str:
        """The answer: the first line of the text that is not blank, stripped."""
        return first_line(self.text)


def first_line(text: str) -> str:
    """Return the first line of a text that is not blank, stripped."""
    return text.strip().partition("\n")[0].strip()
