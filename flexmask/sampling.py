"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from flexmask.errors import OptionError
from flexmask.limits import check_size, shown_number

SMALLEST, LARGEST = 1e-6, 1e6
"""Temperatures: beyond them, logits in 32 bits become infinite, or all the same."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token; more is more random.
        top_k: Sample among this many most likely tokens; 0 for all.
        top_p: Sample among the most likely tokens that together reach this probability.
        seed: Same seed and request, same tokens, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise OptionError(
                f"temperature must not be negative, got {shown_number(self.temperature)}"
            )
        if self.temperature != 0.0 and not SMALLEST <= self.temperature <= LARGEST:
            raise OptionError(
                f"temperature must be 0, or {SMALLEST:g} to {LARGEST:g}, got "
                f"{shown_number(self.temperature)}"
            )
        check_size("top_k", self.top_k)
        if not 0.0 < self.top_p <= 1.0:
            raise OptionError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0
