"""Remembers which claims about the masks of prompts were proved."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

MOST_CLAIMS = 1 << 16
"""Claims that are remembered; then all are forgotten."""

Subject = TypeVar("Subject")


class ProofCache:
    """Answers claims about masks, and proves together those that are new.

    Prompts of the same layout have the same mask, so a data set of many prompts has few claims.
    """

    def __init__(self) -> None:
        """Start without claims."""
        self._is_true: dict[Hashable, bool] = {}

    def of(
        self,
        claims: Sequence[Hashable],
        subjects: Sequence[Subject],
        prove: Callable[[Sequence[Subject]], Sequence[bool]],
    ) -> list[bool]:
        """Return for each claim whether it is proved.

        Args:
            claims: Everything that the truth of each claim depends on.
            subjects: What each claim is about.
            prove: Decides the claims about some subjects.
        """
        if len(self._is_true) > MOST_CLAIMS:
            self._is_true.clear()
        new = {
            claim: subject
            for claim, subject in zip(claims, subjects, strict=True)
            if claim not in self._is_true
        }
        if new:
            self._is_true.update(zip(new, prove([*new.values()]), strict=True))
        return [self._is_true[claim] for claim in claims]
