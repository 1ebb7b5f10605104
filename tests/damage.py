"""What disks, crashes and people do to files."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Damage = Callable[[bytearray, random.Random], None]


def flip_a_bit(content: bytearray, generator: random.Random) -> None:
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)


def zero_a_sector(content: bytearray, generator: random.Random) -> None:
    start = generator.randrange(len(content) // 512 + 1) * 512
    content[start : start + 512] = bytes(len(content[start : start + 512]))


def zero_the_tail(content: bytearray, generator: random.Random) -> None:
    start = generator.randrange(len(content))
    content[start:] = bytes(len(content) - start)


def zero_beyond_the_end(content: bytearray, generator: random.Random) -> None:
    content += bytes(generator.randrange(1, 9000))


def cut(content: bytearray, generator: random.Random) -> None:
    del content[generator.randrange(len(content)) :]


def lose_a_piece(content: bytearray, generator: random.Random) -> None:
    start = generator.randrange(len(content))
    del content[start : start + generator.randrange(1, 600)]


def double_a_piece(content: bytearray, generator: random.Random) -> None:
    start = generator.randrange(len(content))
    content[start:start] = content[start : start + generator.randrange(1, 4000)]


def fill_with_noise(content: bytearray, generator: random.Random) -> None:
    start = generator.randrange(len(content))
    length = generator.randrange(1, 64)
    content[start : start + length] = generator.randbytes(len(content[start : start + length]))


DAMAGES: Sequence[Damage] = (
    flip_a_bit,
    zero_a_sector,
    zero_the_tail,
    zero_beyond_the_end,
    cut,
    lose_a_piece,
    double_a_piece,
    fill_with_noise,
)
