"""The tokens generated for one prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.sampler import NO_TOKEN, NOT_FINITE
from flexmask.generation import FinishReason, Generation
from flexmask.request import Request

FAULTS = {
    NOT_FINITE: "the model's logits hold NaN or infinity; check its weights, and load it in "
    "bfloat16 or float32 if it runs in float16",
    NO_TOKEN: "every token is excluded, by the model's logits or by its generation config; "
    "correct its generation_config.json",
}
"""Why no token can be chosen, by what stands for the token."""


class Row:
    """Takes in tokens until they are complete.

    Attributes:
        finish_reason: Why no more are taken; None while they are.
        fault: Why the next token could not be chosen; empty if all could.
    """

    def __init__(
        self,
        tokenizer: RequestTokenizer,
        max_new_tokens: int,
        stop: Sequence[str],
        eos_token_ids: Collection[int],
    ) -> None:
        """Begin with none.

        Args:
            tokenizer: Makes text of them.
            max_new_tokens: Most tokens.
            stop: Strings that end the row.
            eos_token_ids: Tokens that do.
        """
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._stop = stop
        self._eos_token_ids = eos_token_ids
        self._token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.fault = ""

    @property
    def is_complete(self) -> bool:
        """Whether no more tokens are taken."""
        return bool(self.finish_reason or self.fault)

    def append(self, token_id: int) -> None:
        """Take in the next token, which means nothing if the row is complete.

        Args:
            token_id: The token, or a key of `FAULTS`.
        """
        if self.is_complete:
            return
        if token_id in FAULTS:
            self.fault = f"token {len(self._token_ids) + 1}: {FAULTS[token_id]}"
            return
        self._token_ids.append(token_id)
        if token_id in self._eos_token_ids:
            self.finish_reason = "eos"
        elif self._stop and self._stop_index(self._text()) is not None:
            self.finish_reason = "stop"
        elif len(self._token_ids) == self._max_new_tokens:
            self.finish_reason = "length"

    def generation(self, request: Request, prompt_tokens: int) -> Generation:
        """What a complete row comes to."""
        assert self.finish_reason is not None
        text = self._text()
        return Generation(
            request=request,
            text=text[: self._stop_index(text)],
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=prompt_tokens,
        )

    def _text(self) -> str:
        ended = self.finish_reason == "eos"
        return self._tokenizer.decode(tuple(self._token_ids[:-1] if ended else self._token_ids))

    def _stop_index(self, text: str) -> int | None:
        found = [index for stop in self._stop if (index := text.find(stop)) >= 0]
        return min(found, default=None)
