"""Decodes tokens as they read within a text, where decoders of whole texts drop a space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase


class TextDecoder:
    """Decodes tokens that follow others, `RequestTokenizer` makes it.

    Decoders of tokenizers that put a space before each text take it off again, so that tokens
    decoded by themselves lose the space they begin with. Here they are decoded after a token
    whose text is known: they read as in a decoding of prompt and generation together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap ``tokenizer``."""
        self._tokenizer = tokenizer

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of tokens that other text stands before."""
        text = self.whole((*self._before, *token_ids), skip_special_tokens)
        if self._before and text.startswith(self._text_before):
            return text.removeprefix(self._text_before)
        return self.whole(token_ids, skip_special_tokens)

    @cached_property
    def _before(self) -> tuple[int, ...]:
        """A token of a letter or a digit, which is not a special one; none if there is none."""
        for token_id in self._candidates():
            text = self.whole((token_id,), True).strip()
            if text.isascii() and text.isalnum():
                return (token_id,)
        return ()

    @cached_property
    def _text_before(self) -> str:
        return self.whole(self._before, True)

    def _candidates(self) -> Iterator[int]:
        for text in "aA0":
            yield from self._tokenizer.encode(text, add_special_tokens=False)[-1:]
        yield from range(len(self._tokenizer))

    def whole(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of tokens that are all there is."""
        text = self._tokenizer.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text
