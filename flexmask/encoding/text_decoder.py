"""Decodes tokens in the middle of a text, keeping a leading space that tokenizers drop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from flexmask.encoding.tokenizer_errors import tokenizer_errors


class TextDecoder:
    """Decodes tokens that follow other tokens; `RequestTokenizer` creates it.

    A tokenizer that puts a space before each text removes it when decoding, so tokens decoded
    alone lose their leading space. Here they are decoded after a token whose text is known, which
    gives the same text as decoding prompt and generation together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap ``tokenizer``."""
        self._tokenizer = tokenizer

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of tokens that follow other text."""
        text = self.whole((*self._before, *token_ids), skip_special_tokens)
        if self._before and text.startswith(self._text_before):
            return text.removeprefix(self._text_before)
        return self.whole(token_ids, skip_special_tokens)

    @cached_property
    def is_in_order(self) -> bool:
        """False if the tokenizer edits decoded text across tokens.

        WordPiece removes spaces before punctuation and ``n't``; CTC merges equal tokens.
        """
        if not self._tokenizer.is_fast:
            return True
        decoder = self._tokenizer.backend_tokenizer.decoder
        return not any(kind in repr(decoder) for kind in ("WordPiece", "CTC"))

    @cached_property
    def _before(self) -> tuple[int, ...]:
        """An ordinary token of one letter or digit; empty if the vocabulary has none."""
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
            with tokenizer_errors("it cannot be tokenized"):
                last = self._tokenizer.encode(text, add_special_tokens=False)[-1:]
            yield from last
        yield from range(len(self._tokenizer))

    def whole(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens that are a whole text."""
        with tokenizer_errors("its tokens cannot be decoded"):
            text = self._tokenizer.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        assert isinstance(text, str)
        return text
