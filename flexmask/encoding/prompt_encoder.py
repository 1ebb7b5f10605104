"""Encodes the pieces of a prompt separately, so that their tokens decode to the whole text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from flexmask.encoding.chat_template import WrittenPrompt
from flexmask.encoding.text_decoder import TextDecoder
from flexmask.encoding.text_encoder import Encoded, TextEncoder
from flexmask.encoding.tokenizer_edits import Left, Right
from flexmask.errors import RequestError


class EncodedPrompt(NamedTuple):
    """The tokens of a prompt, without the beginning-of-sequence token.

    Attributes:
        prefix: Everything before the segments.
        segments: The segments.
        suffix: Everything after the segments.
    """

    prefix: Encoded
    segments: list[Encoded]
    suffix: Encoded

    def named(self) -> Iterator[tuple[str, Encoded]]:
        """Yield the pieces with their names in messages."""
        yield "prefix", self.prefix
        for number, segment in enumerate(self.segments, start=1):
            yield f"segment {number}", segment
        yield "suffix", self.suffix


class PromptEncoder:
    """Encodes prefix, segments and suffix; `RequestTokenizer` creates it.

    If a tokenizer puts a space before each text, only the first piece of the prompt gets it. If
    that piece is a single segment, the tokenizer adds the space as usual; with several segments,
    which must not depend on their order, the space becomes a token of the prefix.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        decoder: TextDecoder,
        *,
        template: str | None,
        allow_special_tokens: bool,
    ) -> None:
        """Wrap ``tokenizer``.

        Args:
            tokenizer: The model's tokenizer.
            decoder: A decoder of the same tokenizer.
            template: Source of the chat template that writes user turns; None if not used.
            allow_special_tokens: Whether the texts of requests may hold special tokens.
        """
        self._is_chat = template is not None
        self._decoder = decoder
        self._encoder = TextEncoder(
            tokenizer, template=template or "", allow_special_tokens=allow_special_tokens
        )
        # Few-shot prefixes and suffixes repeat from row to row.
        self._opening = lru_cache(maxsize=256)(self._encode_opening)
        self._ending = lru_cache(maxsize=256)(self._encode_ending)
        self._ahead: dict[str, Encoded] = {}

    def read_ahead(self, segments: Iterable[str]) -> None:
        """Encode segments of the next requests in one call."""
        texts = list(set(segments))
        try:
            self._ahead = dict(zip(texts, self._encoder.encode_all(texts), strict=True))
        except RequestError:  # raised again, for the right segment, when each is encoded
            self._ahead = {}

    def encode(self, written: WrittenPrompt, segments: Sequence[str]) -> EncodedPrompt:
        """Encode a prompt: the texts around its segments, and the segments.

        Raises:
            RequestError: If the tokenizer has no tokens for a piece; the message names it.
        """
        with _naming("prefix"):
            prefix, left = self._opening(written.before)
        if any(written.gaps):
            space, encoded = Encoded(()), self._encode_turns(segments, written.gaps, left)
        else:
            space, encoded = self._encode_segments(segments, left)
        with _naming("suffix"):
            suffix, _ = self._ending(written.after)
        return EncodedPrompt(prefix.then(space), encoded, suffix)

    def encode_choices(self, written: WrittenPrompt, choices: Sequence[str]) -> list[Encoded]:
        """Encode texts, each of which continues a prompt.

        Raises:
            RequestError: If the tokenizer has no tokens for one; the message names it.
        """
        _, left = self._ending(written.after)
        encoded = []
        for number, text in enumerate(choices, start=1):
            with _naming(f"choice {number}"):
                encoded.append(self._encoder.encode(text, left))
        return encoded

    def encode_text(self, text: str) -> Encoded:
        """Encode a text that continues another."""
        return self._encoder.encode(text)

    def _encode_opening(self, before: Sequence[str]) -> tuple[Encoded, Left]:
        """Encode everything before the segments; also return what is to the left of them."""
        if not self._is_chat and before[-1]:
            space, encoded = self._encode_first(before[-1], "start")
            return space.then(encoded), "text"
        return self._encode_parts(self._split(["", *before]), "start", "text")

    def _encode_ending(self, after: Sequence[str]) -> tuple[Encoded, Left]:
        """Encode everything after the segments; also return what is to the left of an answer."""
        is_of_template = self._is_chat and not after[-1]
        right: Right = "end" if is_of_template else "text"
        return self._encode_parts(self._split(after), "text", right)

    def _encode_turns(
        self, texts: Sequence[str], gaps: Sequence[str], left: Left
    ) -> list[Encoded]:
        """Encode segments that are turns, each with what the template writes after it."""
        segments = []
        for number, (text, gap) in enumerate(zip(texts, gaps, strict=True), start=1):
            with _naming(f"segment {number}"):
                segments.append(self._encode_parts(self._split([text, gap, ""]), left, "text")[0])
        return segments

    def _split(self, texts: Sequence[str]) -> list[str | int]:
        """Split texts of the request, of the template, of the request, … at added tokens."""
        parts: list[str | int] = [texts[0]]
        for of_template, of_request in zip(texts[1::2], texts[2::2], strict=True):
            head = parts.pop()
            parts += self._encoder.split(of_template, head=str(head), tail=of_request)
        return parts

    def _encode_parts(
        self, parts: Sequence[str | int], left: Left, right: Right
    ) -> tuple[Encoded, Left]:
        encoded = Encoded(())
        for index, part in enumerate(parts):
            if isinstance(part, int):
                encoded, left = encoded.then(Encoded((part,))), "token"
            elif part:
                is_last = index == len(parts) - 1
                piece = self._encoder.encode(part, left, right if is_last else "end")
                encoded, left = encoded.then(piece), "text"
        return encoded, left

    def _encode_segments(self, texts: Sequence[str], left: Left) -> tuple[Encoded, list[Encoded]]:
        """Encode the segments; the space before them is returned separately."""
        is_spaced = left != "text" and self._encoder.is_spaced(left)
        if is_spaced and len(texts) == 1:
            with _naming("segment 1"):
                space, segment = self._encode_first(texts[0], left)
            return space, [segment]
        segments = []
        for number, text in enumerate(texts, start=1):
            with _naming(f"segment {number}"):
                segments.append(self._ahead.get(text) or self._encoder.encode(text))
        return self._space if is_spaced else Encoded(()), segments

    def _encode_first(self, text: str, left: Left) -> tuple[Encoded, Encoded]:
        """Encode a piece with no text before it; return a separate space token and the piece.

        Some tokenizers add no space before a text that begins with one, but remove one when they
        decode. Before such a text the space becomes a token of its own.
        """
        encoded = self._encoder.encode(text, left)
        if not self._is_chat and text[0].isspace() and self._text_of(encoded) != text:
            apart = self._encoder.encode(text)
            if self._text_of(self._space.then(apart)) == text:
                return self._space, apart
        return Encoded(()), encoded

    @cached_property
    def _space(self) -> Encoded:
        """The token of a single space; empty if the tokenizer has none."""
        space = self._encoder.encode(" ")
        has_token = self._text_of(space.then(self._encoder.encode("a"))).strip() == "a"
        return space if has_token else Encoded(())

    def _text_of(self, encoded: Encoded) -> str:
        return self._decoder.whole(encoded.token_ids)


@contextmanager
def _naming(piece: str) -> Iterator[None]:
    """Add the name of the piece to errors."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{piece}: {error}") from error
