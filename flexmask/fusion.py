"""Fusion: what the prompts of one request have to do with each other.

Under ``attention`` the segments stand in one prompt and the strategy's mask says who sees whom.
Under every other fusion each segment is a prompt of its own, prefix and suffix included, in a row
of its own; docs/fusion.md says when to use which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flexmask.errors import OptionError, RequestError
from flexmask.request import Request
from flexmask.tasks.judge import normalize_answer

FUSIONS = {
    "attention": "all segments in one prompt, under the strategy's mask",
    "none": "the first prompt alone",
    "each": "every prompt alone, a generation for each",
    "mean": "mean of the prompts' logits",
    "max": "for each token the largest probability that a prompt gives it",
    "weighted_mean": "weighted mean of the prompts' logits",
    "weighted_max": "for each token the largest weighted probability that a prompt gives it",
    "vote": "every prompt alone; the answer that most of them give",
}
"""What each fusion does; of prompts, one per segment: prefix, segment, suffix."""

WEIGHTS = ("column", "confidence")
"""Where weights come from: the request's own, which a column of the input holds; or at each step
the probability of the token that the prompt finds most likely."""


@dataclass(frozen=True)
class Fusion:
    """How a request with several segments becomes prompts, and those one generation.

    Attributes:
        name: One of `FUSIONS`.
        weights: One of `WEIGHTS` for the weighted fusions, and None for the others.
    """

    name: str = "attention"
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.name not in FUSIONS:
            raise OptionError(f"fusion must be one of {', '.join(FUSIONS)}, got {self.name!r}")
        if self.weights is not None and self.weights not in WEIGHTS:
            raise OptionError(
                f"fusion weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}"
            )
        if self._is_weighted and self.weights is None:
            raise OptionError(
                f"fusion {self.name!r} needs weights: column (one number per segment, from the "
                "input) or confidence (the model's own)"
            )
        if not self._is_weighted and self.weights is not None:
            raise OptionError(
                f"fusion {self.name!r} takes no weights; weighted_mean and weighted_max do"
            )

    def __str__(self) -> str:
        """Its name, and the weights where it has some."""
        return f"{self.name}-{self.weights}" if self.weights else self.name

    @property
    def _is_weighted(self) -> bool:
        return self.name.startswith("weighted_")

    @property
    def is_of_logits(self) -> bool:
        """Whether the rows of a request step together and take the same tokens."""
        return self.is_mean or self.is_max

    @property
    def is_mean(self) -> bool:
        """Whether logits are averaged."""
        return self.name in ("mean", "weighted_mean")

    @property
    def is_max(self) -> bool:
        """Whether the largest probabilities count."""
        return self.name in ("max", "weighted_max")

    def check(self, request: Request) -> None:
        """Find out whether a request has what it takes.

        Raises:
            RequestError: If its prompts are weighted by numbers that it does not have.
        """
        if self.weights == "column" and not request.weights:
            raise RequestError(
                f"fusion {self.name!r} by column needs weights, a number for each segment"
            )

    def outputs(self, request: Request) -> list[Request]:
        """What generations a request gives: one for itself, or for prompts of it alone.

        What it gives is left as it is when asked again.
        """
        if request.segment is not None or self.name not in ("none", "each"):
            return [request]
        return request.alone() if self.name == "each" else request.alone()[:1]

    def prompts(self, output: Request) -> list[Request]:
        """The prompts that one generation is made of, each a row."""
        return output.alone() if self.is_of_logits or self.name == "vote" else [output]

    def weights_of(self, output: Request) -> tuple[float, ...]:
        """The weight of each of the `prompts`, as far as it is known before they run."""
        return output.weights if self.weights == "column" else (1.0,) * len(output.segments)


def majority(answers: Sequence[str]) -> int:
    """Index of the first answer that most of them equal once normalized.

    Answers are normalized as for exact match (`normalize_answer`). A tie goes to the one that
    stands first. An empty answer has no vote, unless all are empty.
    """
    normalized = [normalize_answer(answer) for answer in answers]
    votes = Counter(answer for answer in normalized if answer) or Counter(normalized)
    return normalized.index(max(votes, key=votes.__getitem__))
