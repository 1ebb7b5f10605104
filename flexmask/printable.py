"""Makes text of others harmless for terminals: what would command one shows as an escape."""

from __future__ import annotations

_SPACES = "\u00a0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_JOINERS = "\u200c\u200d\u200e\u200f"  # and marks of direction, which scripts and emoji need

WORDS = frozenset(_SPACES + _JOINERS)
"""What a line of text may hold though it has no shape of its own."""

LINES = WORDS | frozenset("\n\t")
"""What a text of several lines may hold."""


def printable(text: str, keep: frozenset[str] = frozenset()) -> str:
    r"""Text with all that does not print as escapes, such as ``\x1b``.

    That is: control characters, which move the cursor, set titles or answer for the user; what
    reorders the text around it; and halves of surrogate pairs, as in names that are not UTF-8,
    which no terminal takes.

    Args:
        text: Whatever somebody wrote.
        keep: Characters that stay as they are: `WORDS`, `LINES`, or none.
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
    """JSON that `json.dumps` wrote in ASCII, without the one control character it leaves."""
    return text.replace("\x7f", "\\u007f")
