"""Applies a tokenizer's chat template: finds the text that it writes around a request's texts.

Rendered with marks in place of texts, a template shows what it writes between them. Rendered with
the texts themselves, it must write the same, so that prefix, segments and tail put together are
what the template makes of the whole conversation.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from flexmask.error_text import described
from flexmask.errors import ModelError, RequestError
from flexmask.request import Message, Request

_HARD_TO_COPY = " x\n\"'<&>{}[]\\ "
"""Text that reveals whether a template escapes, cuts or trims the text of a turn."""


class WrittenPrompt(NamedTuple):
    """The texts of a prompt around its segments.

    Texts of the template and of the request take turns, because only the template may write
    special tokens.

    Attributes:
        before: The text before the segments: of the template, of the request, of the template, …
            and last of the request.
        gaps: The text that the template writes after each segment.
        after: The text after the segments and their gaps: of the request, of the template, … and
            last of the request.
    """

    before: tuple[str, ...]
    gaps: tuple[str, ...]
    after: tuple[str, ...]

    @classmethod
    def without_template(cls, request: Request) -> WrittenPrompt:
        """Return the prompt of a request that is put into no chat template.

        Raises:
            RequestError: If it has a system turn or messages.
        """
        for name, value in (("a system turn", request.system), ("messages", request.messages)):
            if value:
                raise RequestError(f"it has {name}, which need a chat template: `chat_template`")
        suffix = request.suffix + request.answer_prefix
        return cls(("", request.prefix), ("",) * len(request.segments), (suffix, "", ""))


class _Form(NamedTuple):
    """The conversation of a request without its texts; requests of a form share what is found.

    Attributes:
        has_system: Whether there is a system turn.
        roles: Role of each message.
        has_prefix_turn: Whether the prefix is a turn of its own.
        num_turns: Number of turns that segments are in.
        has_suffix_turn: Whether the suffix is a turn of its own.
    """

    has_system: bool
    roles: tuple[str, ...]
    has_prefix_turn: bool
    num_turns: int
    has_suffix_turn: bool


class ChatTemplate:
    """Writes requests with a tokenizer's chat template; `RequestTokenizer` creates it.

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
        self._mark = f"text{secrets.token_hex(8)}x"
        self._found = lru_cache(maxsize=256)(self._find)
        self._written = lru_cache(maxsize=256)(self._write_around)
        mark = self._marked(0)
        try:
            text = self._render([_turn("user", mark + _HARD_TO_COPY + mark)])
        except Exception as error:  # raised by the template
            raise ModelError(
                f"the chat template fails: {described(error)}; leave out `chat_template`, or "
                "correct the template in the tokenizer's files"
            ) from error
        parts = text.split(mark)
        if len(parts) != 3 or parts[1] != _HARD_TO_COPY:
            raise ModelError(
                "the chat template does not write the text of a user turn once and unchanged; "
                "leave out `chat_template`"
            )

    @property
    def source(self) -> str:
        """The source text of the template."""
        return str(self._tokenizer.get_chat_template())

    def write(self, request: Request) -> WrittenPrompt:
        """Write the conversation of a request around its segments.

        Raises:
            RequestError: If the template fails on it, has no system role, or changes its text.
        """
        num_turns = len(request.segments) if request.segment_turns == "each" else 0
        return self._written(
            request.system,
            request.messages,
            request.prefix,
            request.suffix,
            request.answer_prefix,
            num_turns,
            len(request.segments),
        )

    def _write_around(
        self,
        system: str,
        messages: tuple[Message, ...],
        prefix: str,
        suffix: str,
        answer_prefix: str,
        num_turns: int,
        num_segments: int,
    ) -> WrittenPrompt:
        is_each = num_turns > 0
        form = _Form(
            has_system=bool(system),
            roles=tuple(message.role for message in messages),
            has_prefix_turn=is_each and bool(prefix),
            num_turns=num_turns,
            has_suffix_turn=is_each and bool(suffix),
        )
        order, between = self._found(form)
        given = [system, *(message.content for message in messages), prefix, suffix]
        texts = {number: text for number, text in enumerate(given) if number in order}
        first = len(given)
        shown = [texts.get(number, self._marked(number)) for number in range(first + num_turns)]
        if not is_each:
            shown.append(self._marked(first))
        try:
            rendered = self._render(_conversation(form, shown))
        except Exception as error:  # raised by the template
            raise RequestError(f"the chat template fails: {described(error)}") from error
        copied = self._copied(rendered, order, between, texts)
        if copied is None:
            names = "messages, prefix or suffix" if system or messages else "prefix or suffix"
            raise RequestError(
                f"the chat template changes the text of its {names}; leave out "
                "`chat_template`, or change that text"
            )
        # Texts of the template and of the conversation take turns; segments are marks.
        pieces = [between[0]]
        for number, after in zip(order, between[1:], strict=True):
            pieces += [copied.get(number, ""), after]
        places = [1 + 2 * index for index, number in enumerate(order) if number >= first]
        segments = [number for number in order if number >= first]
        if segments != order[places[0] // 2 : places[-1] // 2 + 1] or segments != sorted(segments):
            raise RequestError(
                "the chat template writes segments in another order; leave out `chat_template`"
            )
        gaps = [pieces[place + 1] for place in places[:-1]]
        before, rest = pieces[: places[0]], pieces[places[-1] + 1 :]
        if is_each:
            if form.has_suffix_turn:
                gaps.append(rest.pop(0))
            else:
                gaps.append("")
                rest.insert(0, "")
            before.append("")
        else:
            gaps = [""] * num_segments
            # The texts beside the segments are in the same turn: nothing is between them.
            del before[-1], rest[0]
        return WrittenPrompt(tuple(before), tuple(gaps), (*rest, answer_prefix))

    def _find(self, form: _Form) -> tuple[list[int], list[str]]:
        """Find the order in which the template writes texts, and what it writes around them.

        Returns:
            The numbers of the texts, and the texts before the first, between them and after the
            last.

        Raises:
            RequestError: If the template fails, or does not write each text once.
        """
        first = len(form.roles) + 3
        marks = [self._marked(number) for number in range(first + max(1, form.num_turns))]
        turns = _conversation(form, marks)
        written = "".join(turn["content"] for turn in turns)
        wanted = [number for number, mark in enumerate(marks) if mark in written]
        try:
            parts = re.split(rf"{self._mark}(\d+)x", self._render(turns))
        except Exception as error:  # raised by the template
            if form.has_system and self._has_none(form):
                raise RequestError(_NO_SYSTEM) from error
            raise RequestError(f"the chat template fails: {described(error)}") from error
        order = [int(number) for number in parts[1::2]]
        if sorted(order) != wanted:
            if form.has_system and 0 not in order:
                raise RequestError(_NO_SYSTEM)
            raise RequestError(
                "the chat template does not write each turn once; leave out `chat_template`"
            )
        return order, parts[::2]

    def _has_none(self, form: _Form) -> bool:
        """Return True if the template takes a conversation without its system turn."""
        try:
            self._find(form._replace(has_system=False))
        except RequestError:
            return False
        return True

    def _copied(
        self, rendered: str, order: Sequence[int], between: Sequence[str], texts: dict[int, str]
    ) -> dict[int, str] | None:
        """Return the texts as they stand in ``rendered``, perhaps trimmed; None if changed."""
        copied, end = {}, len(between[0])
        if not rendered.startswith(between[0]):
            return None
        for number, after in zip(order, between[1:], strict=True):
            text = texts.get(number, self._marked(number))
            for form in (text, text.lstrip(), text.rstrip(), text.strip()):
                if rendered.startswith(form, end) and rendered.startswith(after, end + len(form)):
                    break
            else:
                return None
            end += len(form) + len(after)
            if number in texts:
                copied[number] = form
        return copied if end == len(rendered) else None

    def _marked(self, number: int) -> str:
        return f"{self._mark}{number}x"

    def _render(self, conversation: Sequence[dict[str, str]]) -> str:
        text = self._tokenizer.apply_chat_template(
            list(conversation), tokenize=False, add_generation_prompt=True
        )
        return str(text)


_NO_SYSTEM = (
    "this chat template has no system role; put the text of `system` into the prefix instead"
)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _conversation(form: _Form, texts: Sequence[str]) -> list[dict[str, str]]:
    """Make the turns of a conversation.

    Args:
        form: Its form.
        texts: The system turn, the messages, prefix, suffix and segments.
    """
    system, *rest = texts
    count = len(form.roles)
    messages, (prefix, suffix, *segments) = rest[:count], rest[count:]
    turns = [_turn("system", system)] if form.has_system else []
    turns += map(_turn, form.roles, messages)
    if not form.num_turns:
        return [*turns, _turn("user", f"{prefix}{segments[0]}{suffix}")]
    turns += [_turn("user", prefix)] if form.has_prefix_turn else []
    turns += [_turn("user", segment) for segment in segments]
    return [*turns, *([_turn("user", suffix)] if form.has_suffix_turn else [])]
