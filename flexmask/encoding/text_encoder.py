"""Encodes pieces of a text so that their concatenated tokens decode to the whole text."""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from flexmask.encoding.tokenizer_edits import (
    Left,
    Right,
    is_editable,
    ordinary_special_ids,
    tokenizer_at,
    without_tokens,
)
from flexmask.encoding.tokenizer_errors import tokenizer_errors
from flexmask.errors import RequestError

FEW_CHARACTERS = 16_384
"""Length of texts that are encoded faster one after the other than by a thread for each."""


class Encoded(NamedTuple):
    """The tokens of a piece.

    Attributes:
        token_ids: The tokens.
        special_text: Text of a special token that the piece contains and that was encoded as
            plain text; None if it contains none.
    """

    token_ids: tuple[int, ...]
    special_text: str | None = None

    def then(self, other: Encoded) -> Encoded:
        """Return the concatenation of this piece and the next."""
        return Encoded(self.token_ids + other.token_ids, self.special_text or other.special_text)


class TextEncoder:
    """Encodes pieces of a longer text; `PromptEncoder` creates it.

    A piece that continues a text gets no extra space before it
    (`flexmask.encoding.tokenizer_edits`). The text of a special token is encoded as plain text:
    only the chat template may end a turn, not the data.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "",
        allow_special_tokens: bool = False,
    ) -> None:
        """Wrap ``tokenizer``.

        Args:
            tokenizer: The model's tokenizer.
            template: Source of its chat template, if used. Added tokens that occur in it count as
                special tokens, even if they are not flagged as such.
            allow_special_tokens: Whether pieces may hold special tokens.
        """
        self._tokenizer = tokenizer
        self._allows_special_tokens = allow_special_tokens
        added = tokenizer.added_tokens_decoder
        special_ids = set(tokenizer.all_special_ids)
        self._special = {
            id_: token.content
            for id_, token in added.items()
            if token.special
            or id_ in special_ids
            or (token.content in template and not token.content.isspace())
        }
        for id_ in special_ids - added.keys():
            self._special[id_] = str(tokenizer.convert_ids_to_tokens(id_))
        # Some tokenizers have sequences of spaces as added tokens; those are ordinary text.
        self._added = {
            token.content: (id_, token)
            for id_, token in added.items()
            if not token.content.isspace()
        }
        self._at = lru_cache(maxsize=None)(self._backend_at)

    def encode(self, text: str, left: Left = "text", right: Right = "text") -> Encoded:
        """Encode one piece; as `encode_all`."""
        return self.encode_all([text], left, right)[0] if text else Encoded(())

    def encode_all(
        self, texts: Sequence[str], left: Left = "text", right: Right = "text"
    ) -> list[Encoded]:
        """Encode pieces, each separately.

        Args:
            texts: The pieces.
            left: The context to the left of each piece.
            right: The context to the right of each piece.

        Raises:
            RequestError: If the tokenizer has no tokens for a piece.
        """
        if not texts:
            return []
        encoded = [Encoded(ids) for ids in self._ids(texts, left, right, is_plain=False)]
        if self._allows_special_tokens:
            return encoded
        for index, text in enumerate(texts):
            found = self._special_text(text, encoded[index].token_ids)
            if found is not None:
                (plain,) = self._ids([text], left, right, is_plain=True)
                self._check_plain(plain)
                encoded[index] = Encoded(plain, found)
        return encoded

    def is_spaced(self, left: Left) -> bool:
        """Return True if the tokenizer puts a space before a text that follows ``left``."""
        return self.encode("a", left).token_ids != self.encode("a").token_ids

    def split(self, text: str, *, head: str = "", tail: str = "") -> list[str | int]:
        """Split the text of a template at its added tokens: text, id, text, id, …, text.

        Args:
            text: Text of the template.
            head: The user's text before it, split only if it may hold special tokens.
            tail: The user's text after it, likewise.
        """
        if self._allows_special_tokens:
            text, head, tail = head + text + tail, "", ""
        parts: list[str | int] = [*self._added_pattern.split(text)] if self._added else [text]
        parts[0] = f"{head}{parts[0]}"
        parts[-1] = f"{parts[-1]}{tail}"
        for index in range(1, len(parts), 2):
            id_, token = self._added[str(parts[index])]
            parts[index] = id_
            if token.lstrip:
                parts[index - 1] = str(parts[index - 1]).rstrip()
            if token.rstrip:
                parts[index + 1] = str(parts[index + 1]).lstrip()
        return parts

    @cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, sorted(self._added, key=len)[::-1]))})")

    def _special_text(self, text: str, token_ids: tuple[int, ...]) -> str | None:
        for id_ in self._special.keys() & token_ids:
            content = self._special[id_]
            if id_ not in self._ordinary_ids or content in text:
                return content
        return None

    def _check_plain(self, token_ids: tuple[int, ...]) -> None:
        for id_ in (self._special.keys() & token_ids) - self._ordinary_ids:
            raise RequestError(
                f"it holds {self._special[id_]!r}, which this tokenizer can only encode as a "
                "special token; remove it, or pass `allow_special_tokens=True`"
            )

    @cached_property
    def _ordinary_ids(self) -> frozenset[int]:
        """Special tokens to which ordinary text may be encoded too."""
        if self._tokenizer.is_fast:
            return ordinary_special_ids(self._tokenizer.backend_tokenizer.model)
        unknown = self._tokenizer.unk_token_id
        return frozenset() if unknown is None else frozenset([unknown])

    def _ids(
        self, texts: Sequence[str], left: Left, right: Right, *, is_plain: bool
    ) -> list[tuple[int, ...]]:
        with tokenizer_errors("it cannot be tokenized"):
            if not self._is_editable:
                return [self._ids_unedited(text, left, is_plain) for text in texts]
            encodings = self._encodings(texts, left, right, is_plain)
            if self._is_set_up_by_others(encodings):
                # From now on with a tokenizer of its own.
                self._tokenizer = copy.deepcopy(self._tokenizer)
                backend = self._tokenizer.backend_tokenizer
                backend.no_padding()
                backend.no_truncation()
                backend.encode_special_tokens = self._tokenizer.split_special_tokens
                self._at.cache_clear()
                encodings = self._encodings(texts, left, right, is_plain)
            return [tuple(encoding.ids) for encoding in encodings]

    def _encodings(
        self, texts: Sequence[str], left: Left, right: Right, is_plain: bool
    ) -> list[Encoding]:
        """Encode by the tokenizer's backend, which is a third faster than by transformers."""
        backend = self._at(left, right, is_plain)
        groups = [texts] if sum(map(len, texts)) > FEW_CHARACTERS else [[text] for text in texts]
        return [
            encoding
            for group in groups
            for encoding in backend.encode_batch_fast(list(group), add_special_tokens=False)
        ]

    def _is_set_up_by_others(self, encodings: Sequence[Encoding]) -> bool:
        """Return True if the tokenizer truncated or padded, or was told to split special tokens.

        A fast tokenizer stores such settings, and every call of transformers overwrites them.
        """
        backend = self._tokenizer.backend_tokenizer
        return backend.encode_special_tokens != self._tokenizer.split_special_tokens or any(
            encoding.overflowing or 0 in encoding.attention_mask for encoding in encodings
        )

    def _backend_at(self, left: Left, right: Right, is_plain: bool) -> Tokenizer:
        if is_plain:
            contents = set(self._special.values())
            return without_tokens(self._at(left, right, False), contents, secrets.token_hex(16))
        return tokenizer_at(self._tokenizer.backend_tokenizer, left, right)

    @cached_property
    def _is_editable(self) -> bool:
        from flexmask.transformers_internals import encodes_by_backend

        return encodes_by_backend(self._tokenizer) and is_editable(
            self._tokenizer.backend_tokenizer
        )

    def _ids_unedited(self, text: str, left: Left, is_plain: bool) -> tuple[int, ...]:
        """Encode with a tokenizer that has parts in Python, whose pipeline cannot be edited.

        A piece that continues a text is encoded after a text that it does not merge with.
        """

        def encode(text: str) -> tuple[int, ...]:
            encoded = self._tokenizer(
                text, add_special_tokens=False, split_special_tokens=is_plain
            )
            return tuple(encoded["input_ids"])

        if left != "text":
            return encode(text)
        for before in ("\n", ".", "a", "0"):
            head, whole = encode(before), encode(before + text)
            if head and whole[: len(head)] == head:
                return whole[len(head) :]
        raise RequestError(
            f"this tokenizer has no tokens for {text[:20]!r} separate from the text before it"
        )
