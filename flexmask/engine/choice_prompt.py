"""A prompt with choices: which tokens are computed, and which one each of them predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from flexmask.layout import Layout

Choices = tuple[tuple[int, ...], ...]
"""The tokens of the choices of a prompt, in the order of its request."""


@dataclass(frozen=True)
class ChoicePrompt:
    """A prompt and the tokens of its choices; `flexmask.engine.scoring` makes it of a group.

    Attributes:
        layout: The prompt, with `stored_choices` behind it.
        choices: The tokens of each choice.
    """

    layout: Layout
    choices: Choices

    def predictions(self) -> list[tuple[int, int]]:
        """Return a slot for each token of each choice in turn, and the token that follows it.

        Example:
            Behind a prompt of 4 tokens, the choices ``a b`` and ``c d e`` are stored as
            ``c d a``. The result is (3, a) (6, b) and (3, c) (4, d) (5, e).
        """
        prompt = self.layout.prompt_length
        starts = accumulate(self.layout.choice_lengths, initial=prompt)
        start_of = dict(zip(_longest_first(self.choices), starts, strict=False))
        return [
            (start_of[index] + offset - 1 if offset else prompt - 1, token_id)
            for index, choice in enumerate(self.choices)
            for offset, token_id in enumerate(choice)
        ]


def stored_choices(choices: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return the tokens of choices that are computed, longest first.

    The last token of a choice is predicted by the one before it, and predicts nothing itself.
    """
    return [choices[index][:-1] for index in _longest_first(choices)]


def _longest_first(choices: Sequence[Sequence[int]]) -> list[int]:
    return sorted(range(len(choices)), key=lambda index: -len(choices[index]))
