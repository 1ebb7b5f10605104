"""Requests: the texts that are generated for, or whose choices are scored."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Literal, NamedTuple, get_args

from flexmask.errors import RequestError


class RequestKey(NamedTuple):
    """Identifies a request in a result file, where segments and samples have rows of their own.

    Attributes:
        uuid: The uuid.
        segment: Number of the segment, for a request that is one segment alone.
        sample: Number of the sample.
    """

    uuid: str
    segment: int | None
    sample: int = 0


ROLES = ("user", "assistant")
"""Roles of the turns before a request; a system turn is apart (`Request.system`)."""

SegmentTurns = Literal["one", "each"]
"""``one``: all segments stand in one user turn; ``each``: each in a user turn of its own."""


@dataclass(frozen=True)
class Message:
    """A turn of a conversation before the request.

    Attributes:
        role: One of `ROLES`.
        content: Its text.

    Raises:
        RequestError: If there is no such role.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            advice = "; pass its text as `system`" if self.role == "system" else ""
            raise RequestError(
                f"a message must have one of the roles {', '.join(ROLES)}, got "
                f"{self.role!r:.60}{advice}"
            )
        if not isinstance(self.content, str):
            raise RequestError(f"a message must hold a text, got {self.content!r:.60}")

    @classmethod
    def of(cls, value: object) -> Message:
        """Return a message, or make one of a mapping with ``role`` and ``content``.

        Raises:
            RequestError: If it is something else.
        """
        if isinstance(value, Message):
            return value
        if not isinstance(value, Mapping) or value.keys() != {"role", "content"}:
            raise RequestError(f"a message must hold a role and its content, got {value!r:.60}")
        return cls(value["role"], value["content"])


@dataclass(frozen=True)
class Request:
    """A request, for which one generation is made (several under ``each``, and with samples).

    Attributes:
        segments: The branches: paraphrases of one question, documents, prompts. At least one.
        prefix: Text that every segment shares, such as an instruction and few-shot examples.
        suffix: Text after the segments that sees all of them; generation continues it. If empty,
            its part is taken by the ends of the segments (`flexmask.layout.TokenizedRequest`).
        answers: Accepted answers, to compute accuracy; may be empty. Without any, the right
            choice is the accepted answer.
        uuid: Identifies the request in a result file.
        weights: A weight for each segment, for fusions that are weighted by column; may be empty.
        system: Text of the system turn. It and ``messages`` need a chat template.
        messages: Turns before the request, such as few-shot examples: `Message`, or mappings with
            ``role`` and ``content``.
        answer_prefix: Start of the answer, which generation continues. With a chat template it
            stands in the assistant's turn, without one after the suffix.
        segment_turns: With a chat template, the user turns of the segments: all in ``one`` with
            prefix and suffix, or ``each`` in its own, as prefix and suffix are then.
        segment: Number of the segment, from 1, if this is one segment of a larger request
            (`alone`); else None.
        sample: Number of the generation, from 0, if this is one of several that continue one
            prompt (`flexmask.Fusion.samples`); else 0.
        choices: Continuations to choose from, which `flexmask.Engine.score` scores; may be empty.
            Each is the text right after the prompt, so it usually begins with a space.
        answer: Index of the right choice, from 0; None if it is not known (`choice_index` finds
            it by its text).
        source: File and line that it was read from, as ``file:line``, for messages.

    Raises:
        RequestError: If there is no segment, a segment is blank, a text holds half of a surrogate
            pair, a message has no role that is known, weights do not match the segments, there is
            one choice only, a choice is empty, or the answer is none of the choices.
        TypeError: If a value is of another type.
    """

    segments: tuple[str, ...]
    prefix: str = ""
    suffix: str = ""
    answers: tuple[str, ...] = ()
    uuid: str = ""
    weights: tuple[float, ...] = ()
    system: str = ""
    messages: tuple[Message, ...] = ()
    answer_prefix: str = ""
    segment_turns: SegmentTurns = "one"
    segment: int | None = None
    sample: int = 0
    source: str = field(default="", compare=False)
    choices: tuple[str, ...] = ()
    answer: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if not self.segments:
            raise RequestError("segments must hold at least one text, got none")
        for number, segment in enumerate(self.segments, start=1):
            if not segment.strip():
                raise RequestError(f"segment {number} is empty")
            _check_text(f"segment {number}", segment)
        for number, answer in enumerate(self.answers, start=1):
            _check_text(f"answer {number}", answer)
        _check_text("prefix", self.prefix)
        _check_text("suffix", self.suffix)
        _check_text("uuid", self.uuid)
        _check_text("system", self.system)
        _check_text("answer_prefix", self.answer_prefix)
        for number, message in enumerate(self.messages, start=1):
            _check_text(f"message {number}", message.content)
        if self.segment_turns not in get_args(SegmentTurns):
            raise RequestError(f"segment_turns must be one or each, got {self.segment_turns!r}")
        self._check_weights()
        self._check_choices()

    def _check_types(self) -> None:
        for name in ("segments", "answers", "choices"):
            texts = getattr(self, name)
            if isinstance(texts, str):
                raise TypeError(
                    f"{name} must be a tuple of texts, got the text {texts!r:.60}; write "
                    f"{name}=({texts!r:.60},)"
                )
            if not isinstance(texts, tuple | list):
                raise TypeError(f"{name} must be a tuple of texts, got {texts!r:.60}")
            for number, text in enumerate(texts, start=1):
                if not isinstance(text, str):
                    raise TypeError(f"{name} must be texts, got {text!r:.60} as number {number}")
            object.__setattr__(self, name, tuple(texts))
        for name in ("prefix", "suffix", "uuid", "system", "answer_prefix"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a text, got {getattr(self, name)!r:.60}")
        if not isinstance(self.messages, tuple | list):
            raise TypeError(f"messages must be a tuple of messages, got {self.messages!r:.60}")
        object.__setattr__(self, "messages", tuple(map(Message.of, self.messages)))
        if not isinstance(self.answer, int | None) or isinstance(self.answer, bool):
            raise TypeError(f"answer must be the index of a choice, got {self.answer!r:.60}")
        if not isinstance(self.weights, tuple | list):
            raise TypeError(f"weights must be a tuple of numbers, got {self.weights!r:.60}")
        for number, weight in enumerate(self.weights, start=1):
            if not isinstance(weight, Real) or isinstance(weight, bool):
                raise TypeError(f"weights must be numbers, got {weight!r:.60} as number {number}")
        object.__setattr__(self, "weights", tuple(self.weights))

    def _check_weights(self) -> None:
        if not self.weights:
            return
        if len(self.weights) != len(self.segments):
            raise RequestError(
                f"weights must be a number for each of the {len(self.segments)} segments, got "
                f"{len(self.weights)}"
            )
        for number, weight in enumerate(self.weights, start=1):
            if not (math.isfinite(weight) and weight >= 0):
                raise RequestError(f"weight {number} must be 0 or more and finite, got {weight}")
        if not any(self.weights):
            raise RequestError("one of the weights must be more than 0")

    def _check_choices(self) -> None:
        if self.choices:
            check_choices(self.choices)
        if self.answer is not None:
            right = self.choices[choice_index(self.answer, self.choices)]
            object.__setattr__(self, "answers", self.answers or (right.strip(),))

    @property
    def key(self) -> RequestKey:
        """Identifies the request in a result file."""
        return RequestKey(self.uuid, self.segment, self.sample)

    @property
    def label(self) -> str:
        """Names the request in messages: by file and line, else by uuid."""
        label = self.source or f"request {self.uuid!r}"
        return label if self.segment is None else f"{label}, segment {self.segment}"

    def with_segments(self, count: int) -> Request:
        """Return the request with its first ``count`` segments only.

        Raises:
            RequestError: If there are fewer, or ``count`` is not positive.
        """
        if count < 1:
            raise RequestError(f"the number of segments must be positive, got {count}")
        if count > len(self.segments):
            raise RequestError(f"{count} segments asked for, got {len(self.segments)}")
        return replace(self, segments=self.segments[:count], weights=self.weights[:count])

    def alone(self, most: int | None = None) -> list[Request]:
        """Return each segment as a request of its own, with prefix and suffix.

        A request that is one segment of a larger request is alone already.

        Args:
            most: Number of segments to return, the first ones; None for all.
        """
        if self.segment is not None:
            return [self]
        texts = self.segments[:most]
        return [self._with_segment(number, text) for number, text in enumerate(texts, start=1)]

    def _with_segment(self, number: int, text: str) -> Request:
        """Return a copy with one segment; unlike `replace`, it does not check all texts again."""
        alone = copy.copy(self)
        for name, value in (("segments", (text,)), ("weights", ()), ("segment", number)):
            object.__setattr__(alone, name, value)
        return alone


def check_choices(choices: Sequence[str]) -> None:
    """Check that one of some choices can be chosen.

    Raises:
        RequestError: If there are fewer than two, one is empty, or one holds half of a surrogate
            pair.
    """
    if len(choices) < 2:
        got = f"only {choices[0]!r:.60}" if choices else "none"
        raise RequestError(f"choices must be at least two, got {got}")
    for number, choice in enumerate(choices, start=1):
        if not choice:
            raise RequestError(f"choice {number} is empty")
        _check_text(f"choice {number}", choice)


def choice_index(answer: int | str, choices: Sequence[str]) -> int:
    """Return the index of the right choice.

    Args:
        answer: Its index from 0; or its text, with or without the space around it. A text that is
            no choice may be the index in digits, as a CSV file has it.
        choices: The choices.

    Raises:
        RequestError: If it is none of the choices.
    """
    if isinstance(answer, str):
        texts = list(choices)
        if answer not in texts:
            texts = [text.strip() for text in choices]
        if texts.count(answer) == 1:
            return texts.index(answer)
        if texts.count(answer) > 1:
            raise RequestError(f"the answer {answer!r:.60} is more than one of the choices")
        if not (answer.isascii() and answer.isdecimal()):
            shown = ", ".join(f"{text!r:.40}" for text in choices) or "none"
            raise RequestError(f"the answer {answer!r:.60} is none of the choices: {shown}")
    number = int(answer[:10]) if isinstance(answer, str) else answer
    if not 0 <= number < len(choices):
        raise RequestError(
            f"the answer must be the index of one of {len(choices)} choices, 0 to "
            f"{len(choices) - 1}, or its text, got {answer!r:.60}"
        )
    return number


def checked_requests(requests: Iterable[Request]) -> Iterator[Request]:
    """Yield requests after checking the type of each.

    Raises:
        TypeError: If one is of another type. A value that is not a series of requests is refused
            before iteration starts.
    """
    if isinstance(requests, str | Request) or not isinstance(requests, Iterable):
        kind = "a single one" if isinstance(requests, Request) else f"{requests!r:.60}"
        raise TypeError(f"requests must be a list of Request, got {kind}; put it into a list")
    return _checked(requests)


def _checked(requests: Iterable[Request]) -> Iterator[Request]:
    for request in requests:
        if not isinstance(request, Request):
            shown = f"{request!r:.60}"
            advice = f"; write Request(segments=({shown},))" if isinstance(request, str) else ""
            raise TypeError(f"requests must be a list of Request, got {shown} in it{advice}")
        yield request


def _check_text(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise RequestError(
            f"{where} holds {character!a}, half of a surrogate pair; write the character whole"
        ) from None
