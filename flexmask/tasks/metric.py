"""Metrics that a judge scores answers by: of texts, of extracted answers, and Python functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cached_property
from typing import ClassVar

import regex

from flexmask.error_text import did_you_mean
from flexmask.errors import JudgeError, OptionError
from flexmask.tasks.judge_function import is_function, judge_function, recorded_function
from flexmask.tasks.matching import (
    contains_answer,
    is_exact_match,
    is_lemma_match,
    lemmatizer,
    token_f1,
)

METRICS = ("exact", "f1", "lemma", "contains", "regex:PATTERN", "choice", "number", "file.py:name")
"""The forms of a metric, for messages and help."""

LETTERS = "ABCD"
MAX_SECONDS = 1.0
"""Limit of the time that a pattern may take for one answer; some take longer than a run."""

_SHOWN = 60
_NUMBER = regex.compile(
    r"(?<![\w.])[-+\u2212]?"
    r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,300})(?!\d)(?:\.\d{1,300}(?!\d))?|\.\d{1,300}(?!\d))"
    r"(?:[eE][-+]?\d{1,3}\b)?"
)
_WORD = r"[\p{Lu}\p{Ll}\p{N}_]"


@dataclass(frozen=True)
class Metric:
    """Scores answers by exact match of normalized texts; subclasses are the other metrics.

    Attributes:
        name: The metric as `parse_metric` reads it.
        extracts: Whether `extract` finds the answer in a longer text.
    """

    name: str
    extracts: ClassVar[bool] = False

    @property
    def recorded(self) -> str:
        """The metric as a run's configuration records it."""
        return self.name

    def check(self) -> None:
        """Raise errors now that scoring the first row would raise.

        Raises:
            OptionError: If a package, file or function is missing.
        """

    def check_answers(self, answers: Sequence[str]) -> None:
        """Check that the metric applies to accepted answers.

        Raises:
            JudgeError: If it does not; the message quotes the answer.
        """

    def extract(self, text: str) -> str:
        """Return the answer in a text; empty if there is none.

        Raises:
            JudgeError: If searching takes too long.
        """
        return text

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """Return the score of an extracted answer, from 0 to 1.

        Raises:
            JudgeError: If the metric does not apply to the accepted answers, or fails.
        """
        return float(is_exact_match(prediction, answers))


@dataclass(frozen=True)
class TextMetric(Metric):
    """A comparison of texts.

    Attributes:
        match: Compares a prediction with the accepted answers.
    """

    match: Callable[[str, Sequence[str]], float]

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """As `Metric.score`."""
        return float(self.match(prediction, answers))


@dataclass(frozen=True)
class LemmaMetric(Metric):
    """Exact match of lemmas.

    Attributes:
        language: Language of the lemmas, an ISO 639 code.
    """

    language: str

    def check(self) -> None:
        """As `Metric.check`."""
        lemmatizer(self.language)

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """As `Metric.score`."""
        return float(is_lemma_match(prediction, answers, self.language))


@dataclass(frozen=True)
class RegexMetric(Metric):
    """Exact match of what a pattern finds first: its first group that matched, or all of it.

    Attributes:
        pattern: The compiled pattern.
    """

    pattern: regex.Pattern[str]
    extracts: ClassVar[bool] = True

    def extract(self, text: str) -> str:
        """As `Metric.extract`."""
        try:
            found = self.pattern.search(text, timeout=MAX_SECONDS)
        except TimeoutError:
            raise JudgeError(
                f"the pattern {self.pattern.pattern!r:.{_SHOWN}} takes more than {MAX_SECONDS:g} "
                f"s on {text!r:.{_SHOWN}}; make it simpler"
            ) from None
        if found is None:
            return ""
        groups = [group for group in found.groups() if group is not None]
        return str(groups[0] if groups else found[0]).strip()


@dataclass(frozen=True)
class ChoiceMetric(Metric):
    """The letter of a choice: the first that stands alone.

    A small letter counts where ``)``, ``.`` or ``:`` follows it, and where it is the whole text.

    Attributes:
        letters: The capital letters of the choices.
    """

    letters: str = LETTERS
    extracts: ClassVar[bool] = True

    @cached_property
    def _pattern(self) -> regex.Pattern[str]:
        large, small = regex.escape(self.letters), regex.escape(self.letters.lower())
        return regex.compile(
            rf"(?<!{_WORD})(?:[{large}](?!{_WORD})(?!['\u2019]\p{{L}})|[{small}](?=[).:](?!\w)))"
            rf"|^[{small}]$"
        )

    def check_answers(self, answers: Sequence[str]) -> None:
        """As `Metric.check_answers`."""
        for answer in answers:
            self._letter_of(answer)

    def extract(self, text: str) -> str:
        """As `Metric.extract`."""
        found = self._pattern.search(text.strip())
        return str(found[0]).upper() if found else ""

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """As `Metric.score`."""
        accepted = {self._letter_of(answer) for answer in answers}
        return float(prediction.upper() in accepted)

    def _letter_of(self, answer: str) -> str:
        letter = str(regex.sub(r"[^\p{L}\p{N}]", "", answer)).upper()
        if len(letter) != 1 or letter not in self.letters:
            raise JudgeError(
                f"choice needs accepted answers that are one of {', '.join(self.letters)}, got "
                f"{answer!r:.{_SHOWN}}"
            )
        return letter


@dataclass(frozen=True)
class NumberMetric(Metric):
    """The last number of a text, compared within a tolerance.

    The last, as in the evaluation of GSM8K (Cobbe et al., 2021,
    https://arxiv.org/abs/2110.14168). Commas between groups of three digits are dropped.

    Attributes:
        tolerance: Largest difference; as a share of the accepted number if ``is_relative``.
        is_relative: Whether the tolerance is a share.
    """

    tolerance: Decimal = Decimal(0)
    is_relative: bool = False
    extracts: ClassVar[bool] = True

    def check_answers(self, answers: Sequence[str]) -> None:
        """As `Metric.check_answers`."""
        for answer in answers:
            self._accepted(answer)

    def extract(self, text: str) -> str:
        """As `Metric.extract`."""
        found = _NUMBER.findall(text)
        return str(found[-1]) if found else ""

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """As `Metric.score`."""
        accepted = [self._accepted(answer) for answer in answers]
        number = _number_in(self.extract(prediction))
        return float(number is not None and any(self._is_near(number, it) for it in accepted))

    def _is_near(self, number: Decimal, accepted: Decimal) -> bool:
        scale = abs(accepted) if self.is_relative else Decimal(1)
        return abs(number - accepted) <= self.tolerance * scale

    def _accepted(self, answer: str) -> Decimal:
        number = _number_in(self.extract(answer))
        if number is None:
            raise JudgeError(
                f"number needs accepted answers that are numbers, got {answer!r:.{_SHOWN}}"
            )
        return number


@dataclass(frozen=True)
class FunctionMetric(Metric):
    """A Python function of prediction and accepted answers, ``file.py:name``."""

    @property
    def recorded(self) -> str:
        """The reference, with a digest of the file."""
        return recorded_function(self.name)

    def check(self) -> None:
        """As `Metric.check`."""
        _ = self._function

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """As `Metric.score`."""
        return self._function(prediction, tuple(answers))

    @cached_property
    def _function(self) -> Callable[[str, tuple[str, ...]], float]:
        return judge_function(self.name)


def parse_metric(text: str, language: str = "en") -> Metric:
    """Parse a metric: a name, for some with an argument after a colon.

    Args:
        text: ``exact``, ``f1``, ``lemma``, ``contains``, ``regex:PATTERN``, ``choice`` or
            ``choice:LETTERS``, ``number`` or ``number:TOLERANCE`` (``number:1%`` is relative),
            or ``path/to/file.py:name``.
        language: Language of the lemmas.

    Raises:
        OptionError: If there is no such metric, or its argument is wrong. The message continues
            the name of the option.
    """
    plain: dict[str, Metric] = {
        "exact": Metric("exact"),
        "f1": TextMetric("f1", token_f1),
        "contains": TextMetric("contains", contains_answer),
        "lemma": LemmaMetric("lemma", language),
        "choice": ChoiceMetric("choice"),
        "number": NumberMetric("number"),
    }
    name, colon, argument = text.partition(":")
    if text in plain:
        return plain[text]
    if colon and name in _WITH_ARGUMENT:
        return _WITH_ARGUMENT[name](text, argument)
    if is_function(text):
        return FunctionMetric(text)
    raise OptionError(
        f"must be one of {', '.join(METRICS)}, got {text!r:.{_SHOWN}}"
        + did_you_mean(name, [*plain, *_WITH_ARGUMENT])
    )


def _regex(text: str, argument: str) -> Metric:
    try:
        if not argument:
            raise regex.error("it is empty")
        return RegexMetric(text, regex.compile(argument))
    except (regex.error, RecursionError, OverflowError, MemoryError, IndexError) as error:
        reason = str(error) or "too large"
        raise OptionError(f"has an invalid pattern {argument!r:.{_SHOWN}}: {reason}") from None


def _choice(text: str, argument: str) -> Metric:
    letters = argument.upper()
    if not 2 <= len(set(letters)) == len(letters) or not letters.isalnum():
        raise OptionError(f"takes two or more letters, as in choice:ABCDE, got {text!r:.{_SHOWN}}")
    return ChoiceMetric(text, letters)


def _tolerance(text: str, argument: str) -> Metric:
    is_relative = argument.endswith("%")
    number = _number_in(argument.removesuffix("%"))
    if number is None or number < 0:
        raise OptionError(
            f"takes a tolerance of 0 or more, as in number:0.01 or number:1%, got "
            f"{text!r:.{_SHOWN}}"
        )
    return NumberMetric(text, number / 100 if is_relative else number, is_relative)


_WITH_ARGUMENT = {"regex": _regex, "choice": _choice, "number": _tolerance}


def _number_in(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("\N{MINUS SIGN}", "-")) if text else None
    except InvalidOperation:
        return None
