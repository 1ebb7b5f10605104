"""Prompts that together become one generation."""

from __future__ import annotations

from dataclasses import dataclass

from flexmask.layout import Layout


@dataclass(frozen=True)
class PromptGroup:
    """The prompts of one generation, which always run in one batch.

    It holds a single prompt, or one for each segment of a request whose prompts are fused, each
    as often as it has samples that vote. The prompt planner makes it of a request; from here on
    down, requests are not known.

    Attributes:
        number: Identifies the group within its run. Groups are numbered from 0 in the order of
            their requests.
        layouts: The tokens of each prompt. Groups that are samples of one request share one
            tuple.
        seeds: A text for each prompt; with the seed of the run it determines what is sampled.
        weights: The weight of each prompt where logits are fused.
        choices: For each prompt the tokens of its choices, which its layout holds behind it
            (`with_choices`); empty where nothing is scored.
    """

    number: int
    layouts: tuple[Layout, ...]
    seeds: tuple[str, ...]
    weights: tuple[float, ...]
    choices: tuple[tuple[tuple[int, ...], ...], ...] = ()

    @property
    def longest(self) -> int:
        """Slots of its longest prompt."""
        return max(map(len, self.layouts))
