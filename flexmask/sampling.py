"""Options of sampling: temperature, top-k, top-p and seed."""

from __future__ import annotations

from dataclasses import dataclass

from flexmask.errors import OptionError
from flexmask.limits import check_size, shown_number

SMALLEST, LARGEST = 1e-6, 1e6
"""Bounds of the temperature; beyond them, logits in float32 become infinite, or all equal."""


@dataclass(frozen=True)
class Sampling:
    """The way tokens are chosen.

    Attributes:
        temperature: Logits are divided by it; 0 takes the most likely token.
        top_k: Sample among this many most likely tokens; 0 for all.
        top_p: Sample among the most likely tokens that together reach this probability.
        seed: Seed of the random numbers. The same seed and request give the same tokens, whatever
            else is in the batch.

    Raises:
        OptionError: If a value is out of range.
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
        """True if the most likely token is taken."""
        return self.temperature == 0.0
