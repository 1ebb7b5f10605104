"""The chat template of a tokenizer: what it writes around the text of a user turn."""

from __future__ import annotations

import secrets
from functools import lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from flexmask.error_text import described
from flexmask.errors import ModelError, RequestError

_HARD_TO_COPY = " x\n\"'<&>{}[]\\ "
"""Text that a template changes if it changes any: escapes, cuts or trims it."""


class UserTurn(NamedTuple):
    """A user turn as the template writes it, cut where the segments stand.

    Attributes:
        before: Written by the template before the user's text.
        prefix: The user's text before the segments, as the template leaves it.
        suffix: The user's text after the segments, as the template leaves it.
        after: Written by the template after the user's text.
    """

    before: str
    prefix: str
    suffix: str
    after: str


class ChatTemplate:
    """Writes user turns with a tokenizer's chat template, `RequestTokenizer` makes it.

    Templates are foreign programs. One that fails, or does not write the text of a user turn once
    and as it is, trimmed at most, is refused when this is made: its prompts would not be those
    asked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Try the template of ``tokenizer``.

        Raises:
            ModelError: If there is none, or it cannot be used.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError("this tokenizer has no chat template; leave out --chat-template")
        self._tokenizer = tokenizer
        # Letters and digits only, which no template treats in a way of its own, and none that a
        # text could hold.
        self._mark = f"segments{secrets.token_hex(8)}"
        self.turn = lru_cache(maxsize=256)(self._turn)
        try:
            text = self._write(self._mark + _HARD_TO_COPY + self._mark)
        except Exception as error:  # the template's own
            raise ModelError(
                f"the chat template fails: {described(error)}; leave out --chat-template, or "
                "mend the template in the tokenizer's files"
            ) from error
        parts = text.split(self._mark)
        if len(parts) != 3 or parts[1] != _HARD_TO_COPY:
            raise ModelError(
                "the chat template does not write the text of a user turn once and unchanged; "
                "leave out --chat-template"
            )

    @property
    def source(self) -> str:
        """The template."""
        return str(self._tokenizer.get_chat_template())

    def _turn(self, prefix: str, suffix: str) -> UserTurn:
        """Write the user turn of a request around its segments.

        Raises:
            RequestError: If the template fails on it, or changes its text.
        """
        try:
            parts = self._write(prefix + self._mark + suffix).split(self._mark)
        except Exception as error:  # the template's own
            raise RequestError(f"the chat template fails: {described(error)}") from error
        if len(parts) == 2:
            before, after = parts
            # Templates may trim a turn; within it, next to the mark, they cannot.
            heads = [text for text in (prefix, prefix.lstrip()) if before.endswith(text)]
            tails = [text for text in (suffix, suffix.rstrip()) if after.startswith(text)]
            if heads and tails:
                head, tail = heads[0], tails[0]
                return UserTurn(before.removesuffix(head), head, tail, after.removeprefix(tail))
        raise RequestError(
            "the chat template changes the text of its prefix or suffix; leave out "
            "--chat-template, or write it otherwise"
        )

    def _write(self, content: str) -> str:
        turn = {"role": "user", "content": content}
        text = self._tokenizer.apply_chat_template(
            [turn], tokenize=False, add_generation_prompt=True
        )
        return str(text)
