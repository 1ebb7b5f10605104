"""Formats the answer of a run for the terminal, with accepted answers marked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from rich.text import Text

from flexmask.printable import printable
from flexmask.show.picture_source import Answer
from flexmask.tasks.matching import is_exact_match

VERDICTS = {True: "right", False: "wrong", None: "not judged"}


def answer_text(answer: Answer) -> Text:
    """Format generation, prediction, accepted answers and measures; accepted ones are marked.

    Marks are underlined and in brackets, which remain in plain text.
    """
    text = Text("generation  ", "bold")
    for piece, is_accepted in marked_pieces(answer.generation, answer.accepted):
        if is_accepted:
            text.append(f"[{printable(piece)}]", "bold underline")
        else:
            text.append(printable(piece))
    text.append(f"  ({answer.finish_reason})\n", "dim")
    text.append("prediction  ", "bold").append(f"{printable(answer.prediction)}  ")
    text.append(f"({VERDICTS[answer.is_correct]})\n", "dim")
    if answer.accepted:
        text.append("accepted    ", "bold")
        for number, accepted in enumerate(answer.accepted):
            is_match = is_exact_match(answer.prediction, [accepted])
            text.append(", " if number else "")
            accepted = printable(accepted)
            text.append(f"[{accepted}]" if is_match else accepted, "underline" if is_match else "")
        text.append("\n")
    if answer.mean_attention is not None:
        text.append("attention   ", "bold").append(f"{shares_text(answer.mean_attention)}\n")
    if answer.logprobs is not None:
        text.append("logprob     ", "bold").append(f"{logprobs_text(answer.logprobs)}\n")
    return text


def logprobs_text(logprobs: Sequence[float]) -> str:
    """Write the log-probability of a generation, and that of its least likely token."""
    count = len(logprobs)
    if count == 1:
        return f"{logprobs[0]:.3f}"
    return f"{math.fsum(logprobs):.3f} in {count} tokens, {min(logprobs):.3f} the least likely"


def shares_text(shares: Sequence[float]) -> str:
    """Write shares of attention with the names of their parts, as pictures have them."""
    names = ("P", *(f"S{number}" for number in range(1, len(shares) - 1)), "T")
    return "  ".join(f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True))


def marked_pieces(text: str, accepted: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Split a text at accepted answers: whole words, in upper or lower case.

    Yields:
        Each piece, and whether it is an accepted answer.
    """
    longest_first = sorted(filter(str.strip, accepted), key=len, reverse=True)
    if not longest_first:
        yield text, False
        return
    pattern = "|".join(rf"(?<!\w){re.escape(answer.strip())}(?!\w)" for answer in longest_first)
    for number, piece in enumerate(re.split(f"({pattern})", text, flags=re.IGNORECASE)):
        if piece:
            yield piece, number % 2 == 1
