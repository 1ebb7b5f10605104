"""Fusion: the way the segments of a request become one generation.

Under ``attention`` all segments are in one prompt, and the strategy's mask decides which tokens
see each other; so it is under ``self_consistency``. Under every other fusion each segment is a
prompt of its own, with prefix and suffix, in a batch row of its own. docs/fusion.md says when to
use which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from flexmask.answers import normalize_answer
from flexmask.error_text import did_you_mean
from flexmask.errors import OptionError, RequestError
from flexmask.limits import check_size
from flexmask.request import Request

FUSIONS = {
    "attention": "all segments in one prompt, under the strategy's mask",
    "none": "the first prompt alone",
    "each": "every prompt alone, a generation for each",
    "mean": "mean of the prompts' logits",
    "mean_prob": "mean of the probabilities that the prompts give each token",
    "max": "for each token the largest probability that a prompt gives it",
    "weighted_mean": "weighted mean of the prompts' logits",
    "weighted_max": "for each token the largest weighted probability that a prompt gives it",
    "vote": "every prompt alone; the answer that most of them give",
    "self_consistency": "all segments in one prompt; the answer that most of its samples give",
}
"""All fusions, each with its description; there is a prompt per segment, but for attention and
self_consistency."""

VOTES = ("vote", "self_consistency")
"""Fusions under which generations vote on the answer of their request."""

SCORE_FUSIONS = {
    "attention": FUSIONS["attention"],
    "none": FUSIONS["none"],
    "each": "every prompt alone, scores for each",
    "mean": "mean of the log-probabilities that the prompts give a choice",
    "mean_prob": "mean of the probabilities that the prompts give a choice",
}
"""Fusions under which choices are scored, each with its description."""

WEIGHTS = ("column", "confidence")
"""Sources of weights: ``column``, the weights of the request, which a column of the input holds;
``confidence``, at each step the probability of the token that the prompt finds most likely."""


@dataclass(frozen=True)
class Fusion:
    """A fusion: which prompts a request becomes, and how they become one generation.

    Attributes:
        name: One of `FUSIONS`.
        weights: One of `WEIGHTS` for the weighted fusions, and None for the others.
        samples: Number of times that each prompt is continued. A vote counts them; under other
            fusions each is a generation of its own.

    Raises:
        OptionError: If there is no such fusion, its weights are missing or superfluous, or the
            number of samples is not positive.
    """

    name: str = "attention"
    weights: str | None = None
    samples: int = 1

    def __post_init__(self) -> None:
        if self.name not in FUSIONS:
            close = did_you_mean(self.name, FUSIONS)
            raise OptionError(
                f"fusion must be one of {', '.join(FUSIONS)}, got {self.name!r}{close}"
            )
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
        check_size("samples", self.samples, 1)

    def __str__(self) -> str:
        """Return its name, with the source of its weights and the samples if it has some."""
        name = f"{self.name}-{self.weights}" if self.weights else self.name
        return name if self.samples == 1 else f"{name}-{self.samples}-samples"

    def record(self) -> dict[str, Any]:
        """Return its JSON values; samples are left out if there is one, as they once were."""
        recorded = asdict(self)
        if self.samples == 1:
            del recorded["samples"]
        return recorded

    @property
    def _is_weighted(self) -> bool:
        return self.name.startswith("weighted_")

    @property
    def is_of_logits(self) -> bool:
        """True if logits are fused, so that all rows of a request take the same tokens."""
        return self.is_mean or self.is_max or self.name == "mean_prob"

    @property
    def is_mean(self) -> bool:
        """True if logits are fused by their mean."""
        return self.name in ("mean", "weighted_mean")

    @property
    def is_max(self) -> bool:
        """True if logits are fused by the largest probability of each token."""
        return self.name in ("max", "weighted_max")

    @property
    def is_vote(self) -> bool:
        """True if the generations of a request vote on its answer."""
        return self.name in VOTES

    @property
    def is_single(self) -> bool:
        """True if one generation is made of a request, and no other is chosen among."""
        return self.name != "each" and self.samples == 1 and not self.is_vote

    @property
    def has_sample_rows(self) -> bool:
        """True if each sample is a generation of its own, with a row of its own."""
        return self.samples > 1 and not self.is_vote

    def check_samples(self, *, is_greedy: bool) -> None:
        """Check that the samples of a prompt can differ.

        Args:
            is_greedy: True if the most likely tokens are taken.

        Raises:
            OptionError: If they cannot, or there is one where samples are counted.
        """
        if self.samples > 1 and is_greedy:
            raise OptionError(
                f"{self.samples} samples need a temperature above 0, since at 0 all are the same"
            )
        if self.name == "self_consistency" and self.samples == 1:
            raise OptionError("fusion 'self_consistency' needs at least 2 samples, got 1")

    def check_one_prompt(self) -> None:
        """Check that each generation continues one prompt, whose attention can be measured.

        Raises:
            OptionError: If logits of several are fused.
        """
        if self.is_of_logits:
            raise OptionError(
                f"segment attention is that of one prompt, but fusion {self.name!r} fuses the "
                "logits of several"
            )

    def check(self, request: Request) -> None:
        """Check that a request has weights if its prompts are weighted by them.

        Raises:
            RequestError: If it has none.
        """
        if self.weights == "column" and not request.weights:
            raise RequestError(
                f"fusion {self.name!r} by column needs weights, a number for each segment"
            )

    def expand(self, request: Request) -> list[Request]:
        """Return the requests that ``request`` stands for, each with a generation of its own.

        ``none`` and ``each`` fuse nothing. They choose segments, and every chosen segment becomes
        a request of its own. All other fusions leave the request as it is. With several samples
        that are not counted by a vote, there is a request for each sample.
        """
        chosen = [request]
        if self.name in ("none", "each"):
            chosen = request.alone(1 if self.name == "none" else None)
        if not self.has_sample_rows:
            return chosen
        return [replace(one, sample=number) for one in chosen for number in range(self.samples)]

    @property
    def after_expansion(self) -> Fusion:
        """The fusion under which requests run that `expand` has returned."""
        if self.is_vote:
            return self
        return Fusion() if self.name in ("none", "each") else replace(self, samples=1)

    def prompts(self, request: Request) -> list[tuple[Request, list[Request]]]:
        """Return the requests that ``request`` stands for, each with its prompts.

        The prompts of each are fused into its generation; there is a batch row for each prompt,
        or for each of its samples if these vote.
        """
        return [(each, self._prompts(each)) for each in self.expand(request)]

    def weights_of(self, request: Request, num_prompts: int) -> tuple[float, ...]:
        """Return a weight for each of the ``num_prompts`` prompts of an expanded request.

        Where the model's confidence weights the prompts, they are 1 until it is known.
        """
        return request.weights if self.weights == "column" else (1.0,) * num_prompts

    def _prompts(self, request: Request) -> list[Request]:
        return request.alone() if self.is_of_logits or self.name == "vote" else [request]


def check_score_fusion(fusion: Fusion) -> None:
    """Check that choices can be scored under a fusion.

    Raises:
        OptionError: If they cannot.
    """
    if fusion.samples > 1:
        raise OptionError(f"choices are scored once, got {fusion.samples} samples")
    if fusion.name not in SCORE_FUSIONS:
        raise OptionError(
            f"choices are scored under the fusions {', '.join(SCORE_FUSIONS)}, got {fusion.name!r}"
        )


def majority(answers: Sequence[str]) -> int:
    """Return the index of the answer that wins a vote: the first of those given most often.

    Answers count as equal if they are once normalized (`normalize_answer`). In a tie the answer
    that comes first wins. An empty answer has no vote, unless all are empty.
    """
    normalized = [normalize_answer(answer) for answer in answers]
    votes = Counter(answer for answer in normalized if answer) or Counter(normalized)
    return normalized.index(max(votes, key=votes.__getitem__))
