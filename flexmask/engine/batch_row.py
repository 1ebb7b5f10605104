"""One row of a batch: the tokens generated for one prompt."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.sampler import NO_TOKEN, NOT_FINITE
from flexmask.generation import FinishReason, Generation, TokenLogprob
from flexmask.request import Request

FAULTS = {
    NOT_FINITE: "the model's logits hold NaN or infinity; check its weights, and load it in "
    "bfloat16 or float32 if it runs in float16",
    NO_TOKEN: "every token is excluded, by the model's logits or by its generation config; "
    "correct its generation_config.json",
}
"""Reasons for which no token can be chosen, by the number that is reported in its place."""


class BatchRow:
    """The generated tokens of one row of a batch; it decides when the row is complete.

    Attributes:
        token_ids: The tokens, the one that ended the row included.
        finish_reason: Why the row ended; None while it takes tokens.
        fault: Why its next token could not be chosen; empty if every token could.
    """

    def __init__(
        self,
        tokenizer: RequestTokenizer,
        max_new_tokens: int,
        stop: Sequence[str],
        eos_token_ids: Collection[int],
    ) -> None:
        """Make a row without tokens.

        Args:
            tokenizer: Decodes the tokens.
            max_new_tokens: Most tokens of the row.
            stop: Strings that end it.
            eos_token_ids: Tokens that end it.
        """
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._stop = stop
        self._eos_token_ids = eos_token_ids
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.fault = ""
        self._logprobs: list[Sequence[float]] = []
        self._most_likely: list[Sequence[int]] = []

    @property
    def is_complete(self) -> bool:
        """True if the row takes no more tokens."""
        return bool(self.finish_reason or self.fault)

    def append(self, token_id: int) -> None:
        """Append the next token; one that comes after the row is complete is dropped.

        Args:
            token_id: The token, or a key of `FAULTS`.
        """
        if self.is_complete:
            return
        if token_id in FAULTS:
            self.fault = f"token {len(self.token_ids) + 1}: {FAULTS[token_id]}"
            return
        self.token_ids.append(token_id)
        if token_id in self._eos_token_ids:
            self.finish_reason = "eos"
        elif self._stop and self._stop_index(self._text()) is not None:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self._max_new_tokens:
            self.finish_reason = "length"

    def add_logprobs(self, logprobs: Sequence[float], most_likely: Sequence[int]) -> None:
        """Add the log-probabilities of the token that was appended last.

        Args:
            logprobs: Of the token, and of each of the most likely ones.
            most_likely: The most likely tokens.
        """
        self._logprobs.append(logprobs)
        self._most_likely.append(most_likely)

    def generation(self, request: Request, prompt_tokens: int) -> Generation:
        """Make the generation of a row that is complete.

        Args:
            request: The request that was generated for.
            prompt_tokens: Slots of its prompts.
        """
        assert self.finish_reason is not None
        text = self._text()
        return Generation(
            request=request,
            text=text[: self._stop_index(text)],
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=prompt_tokens,
            logprobs=tuple(own for own, *_ in self._logprobs) if self._logprobs else None,
            top_logprobs=tuple(map(self._top, self._most_likely, self._logprobs))
            if self._logprobs
            else None,
        )

    def _top(
        self, most_likely: Sequence[int], logprobs: Sequence[float]
    ) -> tuple[TokenLogprob, ...]:
        return tuple(
            TokenLogprob(token_id, self._tokenizer.decode((token_id,)), logprob)
            for token_id, logprob in zip(most_likely, logprobs[1:], strict=True)
            if logprob > -math.inf
        )

    def _text(self) -> str:
        ended = self.finish_reason == "eos"
        return self._tokenizer.decode(tuple(self.token_ids[:-1] if ended else self.token_ids))

    def _stop_index(self, text: str) -> int | None:
        found = [index for stop in self._stop if (index := text.find(stop)) >= 0]
        return min(found, default=None)
