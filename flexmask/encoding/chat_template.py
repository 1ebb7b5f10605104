"""Applies a tokenizer's chat template: finds the text that it writes around a user turn."""

from __future__ import annotations

import secrets
from functools import lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from flexmask.error_text import described
from flexmask.errors import ModelError, RequestError

_HARD_TO_COPY = " x\n\"'<&>{}[]\\ "
"""Text that reveals whether a template escapes, cuts or trims the text of a turn."""


class UserTurn(NamedTuple):
    """The text of a user turn around the segments.

    Attributes:
        before: Text of the template before the user's text.
        prefix: The user's text before the segments, perhaps trimmed by the template.
        suffix: The user's text after the segments, perhaps trimmed by the template.
        after: Text of the template after the user's text.
    """

    before: str
    prefix: str
    suffix: str
    after: str


class ChatTemplate:
    """Writes user turns with a tokenizer's chat template; `RequestTokenizer` creates it.

    A template is a program that comes with the tokenizer. The constructor refuses one that fails,
    or that does not copy the text of a user turn exactly once and unchanged except for trimming,
    because its prompts would differ from the request.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Test the template of ``tokenizer``.

        Raises:
            ModelError: If the tokenizer has no template, or an unusable one.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError("this tokenizer has no chat template; leave out `chat_template`")
        self._tokenizer = tokenizer
        # Letters and digits only, which templates do not escape, and random, so that no text
        # contains it.
        self._mark = f"segments{secrets.token_hex(8)}"
        self.turn = lru_cache(maxsize=256)(self._turn)
        try:
            text = self._write(self._mark + _HARD_TO_COPY + self._mark)
        except Exception as error:  # raised by the template
            raise ModelError(
                f"the chat template fails: {described(error)}; leave out `chat_template`, or "
                "correct the template in the tokenizer's files"
            ) from error
        parts = text.split(self._mark)
        if len(parts) != 3 or parts[1] != _HARD_TO_COPY:
            raise ModelError(
                "the chat template does not write the text of a user turn once and unchanged; "
                "leave out `chat_template`"
            )

    @property
    def source(self) -> str:
        """The source text of the template."""
        return str(self._tokenizer.get_chat_template())

    def _turn(self, prefix: str, suffix: str) -> UserTurn:
        """Write the user turn of a request around its segments.

        Raises:
            RequestError: If the template fails on it, or changes its text.
        """
        try:
            parts = self._write(prefix + self._mark + suffix).split(self._mark)
        except Exception as error:  # raised by the template
            raise RequestError(f"the chat template fails: {described(error)}") from error
        if len(parts) == 2:
            before, after = parts
            # A template may trim the ends of a turn, but not the text next to the mark.
            heads = [text for text in (prefix, prefix.lstrip()) if before.endswith(text)]
            tails = [text for text in (suffix, suffix.rstrip()) if after.startswith(text)]
            if heads and tails:
                head, tail = heads[0], tails[0]
                return UserTurn(before.removesuffix(head), head, tail, after.removeprefix(tail))
        raise RequestError(
            "the chat template changes the text of its prefix or suffix; leave out "
            "`chat_template`, or change that text"
        )

    def _write(self, content: str) -> str:
        turn = {"role": "user", "content": content}
        text = self._tokenizer.apply_chat_template(
            [turn], tokenize=False, add_generation_prompt=True
        )
        return str(text)
