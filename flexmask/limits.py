"""Limits of numbers of tokens, rows and segments, checked before they are used."""

from __future__ import annotations

from flexmask.errors import OptionError

LARGEST_SIZE = 2**31 - 1
"""Numbers of tokens, rows and segments are stored in 32 bits."""

_SHOWN_DIGITS = 20


def check_size(name: str, value: int, least: int = 0) -> int:
    """Check a number of tokens, rows or the like, and return it.

    Args:
        name: Name of the option or argument.
        value: Its value.
        least: The smallest allowed value: 0 or 1.

    Raises:
        OptionError: If it is too small or too large.
    """
    if value < least:
        bound = "not be negative" if least == 0 else "be positive"
        raise OptionError(f"{name} must {bound}, got {shown_number(value)}")
    if value > LARGEST_SIZE:
        raise OptionError(f"{name} must be at most {LARGEST_SIZE:,}, got {shown_number(value)}")
    return value


def read_size(name: str, text: str, form: str, *, least: int = 1, given: str | None = None) -> int:
    """Parse a number of tokens, rows or the like.

    Args:
        name: Name of the option.
        text: Its value.
        form: The expected form for the message, such as ``a positive number or auto``.
        least: The smallest allowed value: 0 or 1.
        given: The whole value of the option, if ``text`` is a part of it.

    Raises:
        OptionError: If it is not such a number, or too large.
    """
    stripped = text.strip()
    digits = stripped.lstrip("0") or stripped[-1:]
    is_number = digits.isascii() and digits.isdecimal()
    if not is_number or (digits == "0" and least > 0):
        raise OptionError(f"{name} must be {form}, got {_shortened(given or text)!r}")
    if len(digits) > _SHOWN_DIGITS:  # Python refuses to parse very many
        raise OptionError(
            f"{name} must be at most {LARGEST_SIZE:,}, got a number of {len(digits):,} digits"
        )
    return check_size(name, int(digits), least)


def shown_number(value: float) -> str:
    """Return a number as text for a message; a very long one by its length."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length():,} bits"
    return str(value)


def _shortened(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN_DIGITS else f"{text[: 2 * _SHOWN_DIGITS]}…"
