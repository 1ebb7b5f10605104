"""Makes text from outside safe to print: control characters are shown as escapes."""

from __future__ import annotations

_SPACES = "\u00a0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_JOINERS = "\u200c\u200d\u200e\u200f"  # with direction marks, which some scripts and emoji need

WORDS = frozenset(_SPACES + _JOINERS)
"""Invisible characters that are allowed in a line of text."""

LINES = WORDS | frozenset("\n\t")
"""Invisible characters that are allowed in a text of several lines."""


def printable(text: str, keep: frozenset[str] = frozenset()) -> str:
    r"""Return text with unprintable characters as escapes, such as ``\x1b``.

    They are: control characters, which can move the cursor, set titles or send input to the
    shell; characters that reorder the text around them; and halves of surrogate pairs, which
    occur in file names that are not UTF-8 and cannot be encoded.

    Args:
        text: Text from a file or a user.
        keep: Characters to leave unchanged: `WORDS`, `LINES`, or none.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in keep
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def printable_json(text: str) -> str:
    """Escape DEL, the one control character that `json.dumps` leaves in ASCII output."""
    return text.replace("\x7f", "\\u007f")
