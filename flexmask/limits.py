"""Limits of numbers of tokens, rows, segments and bytes, checked before they are used."""

from __future__ import annotations

import re
from decimal import Decimal

from flexmask.errors import OptionError

LARGEST_SIZE = 2**31 - 1
"""Numbers of tokens, rows and segments are stored in 32 bits."""

LARGEST_BYTES = 2**63 - 1
"""Numbers of bytes are stored in 64 bits."""

BYTE_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
"""Bytes of each unit of a size."""

_SHOWN_DIGITS = 20
_BYTES = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) *([A-Za-z]*)", re.ASCII)


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


def read_bytes(name: str, text: str, *, least: int = 0) -> int:
    """Parse a number of bytes, such as ``8GiB``, ``500MB``, ``1.5TB`` or ``1000000``.

    Args:
        name: Name of the option.
        text: Its value; capital and small letters mean the same.
        least: The smallest allowed value: 0 or 1.

    Raises:
        OptionError: If it is not such a number, or too large.
    """
    units = {unit.lower(): factor for unit, factor in BYTE_UNITS.items()}
    found = _BYTES.fullmatch(text.strip())
    factor = units.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise OptionError(
            f"{name} must be a size such as 8GiB, 500MB or 1000000 (bytes), got "
            f"{_shortened(text)!r}"
        )
    num_bytes = int(Decimal(found[1]) * factor)
    if not least <= num_bytes <= LARGEST_BYTES:
        bound = "at most 8,388,607 TiB" if num_bytes > LARGEST_BYTES else "positive"
        raise OptionError(f"{name} must be {bound}, got {_shortened(text)!r}")
    return num_bytes


def shown_bytes(num_bytes: int) -> str:
    """Return a number of bytes as text, such as ``1.5 GiB``."""
    size, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{num_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def shown_number(value: float) -> str:
    """Return a number as text for a message; a very long one by its length."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length():,} bits"
    return str(value)


def _shortened(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN_DIGITS else f"{text[: 2 * _SHOWN_DIGITS]}…"
