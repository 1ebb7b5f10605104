"""What comes back for a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flexmask.request import Request

FinishReason = Literal["eos", "stop", "length"]
"""Why a row ended: end-of-sequence token, stop string, or ``max_new_tokens`` reached."""


@dataclass(frozen=True)
class Generation:
    """The text generated for one request.

    Attributes:
        request: What was asked.
        text: Generated text up to the end-of-sequence token or stop string, which it leaves out.
        token_ids: Generated tokens, those of the stop included.
        finish_reason: Why it ended.
        prompt_tokens: Prompt length in slots, copies of the prefix counted.
    """

    request: Request
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int

    @property
    def prediction(self) -> str:
        """The answer: the first line of the text that is not blank, stripped."""
        return self.text.strip().partition("\n")[0].strip()
