"""Prints requests and their masks, for `show`."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexmask.printable import WORDS, printable
from flexmask_cli.streams import write_styled

if TYPE_CHECKING:
    from flexmask.show.mask_picture import Picture
    from flexmask.show.picture_source import Subject

UNLIMITED = 1_000_000
"""A width in characters that no line reaches."""

ASCII_COLUMNS = 104
"""Maximum width of a picture in plain characters, which are twice as high as wide."""


def print_pictures(subject: Subject, pictures: Sequence[Picture], *, is_ascii: bool) -> None:
    """Print a request and its masks, fitted to the terminal; in a pipe, as plain characters."""
    from rich.console import Console
    from rich.text import Text

    from flexmask.show.answer_text import answer_text
    from flexmask.show.prompt_text import prompt_text
    from flexmask.show.terminal import ascii_picture, block_picture

    is_ascii = is_ascii or not sys.stdout.isatty() or "utf" not in sys.stdout.encoding.lower()
    columns, lines = shutil.get_terminal_size()
    written = io.StringIO()
    console = Console(
        file=written,
        force_terminal=sys.stdout.isatty(),
        width=columns if sys.stdout.isatty() else UNLIMITED,
        color_system=None if is_ascii else "auto",
        soft_wrap=True,
        markup=False,
        emoji=False,
        highlight=False,
    )
    console.print(Text(printable(subject.heading, WORDS), "bold"))
    if subject.answer is not None:
        console.print(answer_text(subject.answer))
    for picture in pictures:
        console.print(Text(printable(picture.title, WORDS), "bold"))
        console.print(prompt_text(picture.tokens, columns))
        console.print(printable(picture.summary, WORDS))
        if is_ascii:
            console.print(ascii_picture(picture, min(columns, ASCII_COLUMNS)))
        else:
            is_coloured = console.color_system is not None and not console.no_color
            console.print(block_picture(picture, columns, lines, is_coloured=is_coloured))
    write_styled(written.getvalue())
