"""Extracts answers from generations and scores them against the accepted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

from flexmask.choice_scores import Normalize, Score, check_normalization
from flexmask.errors import JudgeError, OptionError
from flexmask.generation import Generation, first_line
from flexmask.tasks.metric import Metric, parse_metric

CUTS = ("first line", "all")
"""The part of a generation that is the answer: the first line that is not blank, or all."""


@dataclass(frozen=True)
class Judge:
    """Extracts answers from generations and scores them.

    Attributes:
        cut: One of `CUTS`, the part of a generation in which the answer is.
        metric: Extracts the answer from that part, and scores it: `parse_metric` lists the forms.
        language: Language of the lemmas.

    Raises:
        OptionError: If there is no such cut or metric.
    """

    cut: str = CUTS[0]
    metric: str = "exact"
    language: str = "en"

    def __post_init__(self) -> None:
        if self.cut not in CUTS:
            raise OptionError(f"cut must be one of {', '.join(CUTS)}, got {self.cut!r}")
        try:
            _ = self.parsed
        except OptionError as error:
            raise OptionError(f"`judge` {error}") from None

    @cached_property
    def parsed(self) -> Metric:
        """The metric."""
        return parse_metric(self.metric, self.language)

    def check(self) -> None:
        """Raise errors now that scoring the first row would raise.

        Raises:
            OptionError: If the metric needs a package or a file that is not there.
        """
        self.parsed.check()

    def record(self) -> dict[str, Any]:
        """Return the judge as a run's configuration records it."""
        return asdict(self) | {"metric": self.parsed.recorded}

    def prediction(self, generation: Generation) -> str:
        """Return the answer in a generation; empty if the metric finds none.

        Raises:
            JudgeError: If searching takes too long; the message names the request.
        """
        try:
            return self.answer_in(generation.text)
        except JudgeError as error:
            raise JudgeError(f"{generation.request.label}: {error}") from error

    def answer_in(self, text: str) -> str:
        """Return the answer in a generated text; empty if the metric finds none."""
        return self.parsed.extract(text.strip() if self.cut == "all" else first_line(text))

    def check_answers(self, answers: Sequence[str]) -> None:
        """Check that the metric applies to accepted answers.

        Raises:
            JudgeError: If it does not, such as ``choice`` to the answer ``London``.
        """
        self.parsed.check_answers(answers)

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """Return the score of a prediction, from 0 to 1.

        Raises:
            JudgeError: If the metric does not apply to the accepted answers, or fails.
        """
        return self.parsed.score(prediction, answers)


@dataclass(frozen=True)
class ChoiceJudge:
    """Picks the choice with the highest score, and compares it with the right one by its index.

    Attributes:
        normalize: What log-probabilities are divided by before they are compared.
        metric: The metric that compares indices (`flexmask.results.evaluation.evaluate`).
        language: The language, which this metric does not use.
    """

    normalize: Normalize = "none"
    metric: ClassVar[str] = "exact"
    language: ClassVar[str] = "en"

    def __post_init__(self) -> None:
        check_normalization(self.normalize)

    def check(self) -> None:
        """Do nothing: no package is needed."""

    def record(self) -> dict[str, Any]:
        """Return the judge as a run's configuration records it."""
        return asdict(self)

    def prediction(self, score: Score) -> str:
        """Return the text of the choice with the highest score."""
        return score.request.choices[score.chosen(self.normalize)].strip()

    def check_answers(self, answers: Sequence[str]) -> None:
        """Do nothing: the right choice is known by its index."""
