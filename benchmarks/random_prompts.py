"""Requests of random words, with a given number of tokens."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from flexmask import Request, RequestTokenizer, Strategy
from flexmask.errors import RequestError

SEGMENTS = 5
TAIL_TOKENS = 8
LONGEST_PREFIX = 32
QUESTION_PREFIX = 224
QUESTION_SEGMENTS = (20, 22, 23, 25, 26, 27, 28, 29, 31, 32, 35, 40)
QUESTION_TAIL = 3
"""Tokens of 1,000 questions of MyriadLAMA under the bundled tokenizer: of their five-shot prefix,
of their paraphrases (at equal quantiles), and of the end that they share."""


class RandomPrompts:
    """Draws requests whose words are one token each.

    Attributes:
        tokenizer: Tokenizes these requests.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
        """Find the words of a byte-level tokenizer, whose tokens begin with the space."""
        self.tokenizer = RequestTokenizer(tokenizer)
        self._words = sorted(
            f" {token[1:]}"
            for token in tokenizer.get_vocab()
            if token.startswith("Ġ") and token[1:].isascii() and token[1:].isalpha()
        )
        self._draw = random.Random(seed)
        self._checked: set[tuple[str, int]] = set()
        self._first_tokens = len(self.tokenizer(self._request(0, [1], 1)).prefix)

    def request(self, strategy: Strategy, slots: int) -> Request:
        """Return a request of five segments, whose layout under ``strategy`` has ``slots`` slots.

        Raises:
            RequestError: If it has another number, because the request is too short, or the
                strategy copies parts of it that others do not.
        """
        prefix = min(LONGEST_PREFIX, slots // 16)
        copies = SEGMENTS if strategy.name in ("ensemble_isolation", "document") else 1
        length, rest = divmod(slots - TAIL_TOKENS - copies * prefix, SEGMENTS)
        lengths = [length + (number < rest) for number in range(SEGMENTS)]
        if length < 1:
            raise RequestError(f"{slots} slots are too few for {SEGMENTS} segments")
        request = self._request(prefix - self._first_tokens, lengths, TAIL_TOKENS)
        if (strategy.name, slots) not in self._checked:
            if (found := len(strategy.layout(self.tokenizer(request)))) != slots:
                raise RequestError(f"{strategy.name} lays {slots} slots out as {found}")
            self._checked.add((strategy.name, slots))
        return request

    def questions(self, count: int) -> list[Request]:
        """Return requests with the lengths of MyriadLAMA's questions and one prefix."""
        prefix = self._text(QUESTION_PREFIX - self._first_tokens)
        return [
            Request(
                segments=tuple(map(self._text, self._draw.choices(QUESTION_SEGMENTS, k=SEGMENTS))),
                prefix=prefix,
                suffix=self._text(QUESTION_TAIL),
                uuid=str(number),
            )
            for number in range(count)
        ]

    def _request(self, prefix: int, segments: list[int], tail: int) -> Request:
        return Request(
            segments=tuple(map(self._text, segments)),
            prefix=self._text(prefix),
            suffix=self._text(tail),
        )

    def _text(self, tokens: int) -> str:
        return "".join(self._draw.choices(self._words, k=tokens))
