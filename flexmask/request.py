"""Requests: what to generate for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from flexmask.errors import RequestError


@dataclass(frozen=True)
class Request:
    """One thing to generate for.

    Attributes:
        segments: The branches: paraphrases of one question, documents, prompts. At least one.
        prefix: Text that every segment shares, such as an instruction and few-shot examples.
        suffix: Text after the segments that sees all of them; generation continues it. Empty
            means that it is taken from the segments (`flexmask.layout.TokenizedRequest`).
        answers: Accepted answers, for accuracy; empty where there are none.
        uuid: Identifies the request in a result file.
        source: Where it was read, as ``file:line``; for messages.
    """

    segments: tuple[str, ...]
    prefix: str = ""
    suffix: str = ""
    answers: tuple[str, ...] = ()
    uuid: str = ""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
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

    @property
    def label(self) -> str:
        """Names the request in messages: where it was read, else its uuid."""
        return self.source or f"request {self.uuid!r}"

    def with_segments(self, count: int) -> Request:
        """Keep the first ``count`` segments.

        Raises:
            RequestError: If there are fewer, or ``count`` is not positive.
        """
        if count < 1:
            raise RequestError(f"the number of segments must be positive, got {count}")
        if count > len(self.segments):
            raise RequestError(f"{count} segments asked for, got {len(self.segments)}")
        return replace(self, segments=self.segments[:count])


def _check_text(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise RequestError(
            f"{where} holds {character!a}, half of a surrogate pair; write the character whole"
        ) from None
