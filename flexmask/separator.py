"""Separators: texts that divide a prompt written by others into prefix, segments and suffix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from flexmask.errors import OptionError
from flexmask.request import Request


@dataclass(frozen=True)
class Separator:
    r"""A text between the parts of a prompt.

    The text after the last separator is the request's suffix, which sees everything; the parts
    before are its segments. Parts of white space alone are left out, separators with them.

    Attributes:
        text: The separator; None for prompts of one segment.
        keep: Leave each separator at the end of the part before it, so that the text stays the
            same; otherwise it is removed.
        has_prefix: The first part is the prefix, which all segments share, and not a segment.

    Raises:
        OptionError: If the separator is empty, or there is none that could end a prefix.

    Example:
        >>> request = Separator("\n").divide("One.\nTwo.\nWhich is first?")
        >>> request.segments, request.suffix
        (('One.\n', 'Two.\n'), 'Which is first?')
    """

    text: str | None = None
    keep: bool = True
    has_prefix: bool = False

    def __post_init__(self) -> None:
        if self.text == "":
            raise OptionError("separator must not be empty; leave it out for one segment")
        if self.text is None and self.has_prefix:
            raise OptionError("has_prefix needs a separator that ends the prefix")

    @classmethod
    def of_option(cls, text: str | None, *, keep: bool, has_prefix: bool) -> Self:
        r"""Make the separator that an option of a command names, in which ``\n`` is a newline.

        Raises:
            OptionError: As the class does.
        """
        return cls(None if text is None else text.replace("\\n", "\n"), keep, has_prefix)

    def divide(self, text: str) -> Request:
        """Return the request of a prompt.

        Raises:
            RequestError: If the prompt is empty.
        """
        if self.text is None:
            return Request((text,))
        *parts, tail = text.split(self.text)
        parts = [part + self.text * self.keep for part in parts]
        prefix = parts.pop(0) if self.has_prefix and parts else ""
        parts = [part for part in parts if part.strip()]
        return Request(tuple(parts) or (tail,), prefix, tail if parts else "")
