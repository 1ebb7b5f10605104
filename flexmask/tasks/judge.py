"""Extracts answers from generations and scores them against the accepted ones.

Answers are normalized before they are compared (`flexmask.answers`). Token F1 is SQuAD's
(Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from flexmask.answers import normalize_answer
from flexmask.choice_scores import Normalize, Score, check_normalization
from flexmask.errors import OptionError
from flexmask.generation import Generation

CUTS = ("first line", "all")
"""The part of a generation that is the answer: the first line that is not blank, or all."""
METRICS = ("exact", "f1", "lemma")
"""Exact match and token F1 of normalized texts, and exact match of their lemmas."""


def is_exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Return True if a prediction equals one of the answers after normalization.

    An empty prediction matches nothing.
    """
    normalized = normalize_answer(prediction)
    return bool(normalized) and any(normalized == normalize_answer(answer) for answer in answers)


def token_f1(prediction: str, answers: Iterable[str]) -> float:
    """Return the F1 of words with the closest answer: harmonic mean of precision and recall.

    Example:
        >>> token_f1("the Big Smoke town", ["Big Smoke", "London"])
        0.8
    """
    return max((_f1(prediction, answer) for answer in answers), default=0.0)


def is_lemma_match(prediction: str, answers: Collection[str], language: str = "en") -> bool:
    """Return True if a prediction equals one of the answers, as written or lemmatized.

    Lemmas come from the tables of ``simplemma`` (``pip install 'flexmask[lemma]'``).

    Example:
        >>> is_lemma_match("The rivers", ["river"])
        True

    Raises:
        OptionError: If ``simplemma`` is not installed, or does not know ``language``, an ISO 639
            code.
    """
    lemmatize = _lemmatizer(language)
    found = lemmatize(prediction)
    return is_exact_match(prediction, answers) or (
        bool(found) and any(found == lemmatize(answer) for answer in answers)
    )


@dataclass(frozen=True)
class Judge:
    """Extracts answers from generations and scores them.

    Attributes:
        cut: One of `CUTS`.
        metric: One of `METRICS`, computed by `score`.
        language: Language of the lemmas.
    """

    cut: str = CUTS[0]
    metric: str = METRICS[0]
    language: str = "en"

    def __post_init__(self) -> None:
        for name, value, allowed in (("cut", self.cut, CUTS), ("judge", self.metric, METRICS)):
            if value not in allowed:
                raise OptionError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    def check(self) -> None:
        """Raise errors now that scoring the first row would raise.

        Raises:
            OptionError: If the metric needs lemmas and they are not available.
        """
        if self.metric == "lemma":
            _lemmatizer(self.language)

    def prediction(self, generation: Generation) -> str:
        """Return the answer in a generation."""
        return generation.text.strip() if self.cut == "all" else generation.prediction

    def score(self, prediction: str, answers: Collection[str]) -> float:
        """Return the score of a prediction, from 0 to 1."""
        if self.metric == "f1":
            return token_f1(prediction, answers)
        if self.metric == "lemma":
            return float(is_lemma_match(prediction, answers, self.language))
        return float(is_exact_match(prediction, answers))


@dataclass(frozen=True)
class ChoiceJudge:
    """Picks the choice with the highest score, and compares it with the right one by its index.

    Attributes:
        normalize: What log-probabilities are divided by before they are compared.
    """

    normalize: Normalize = "none"
    metric = "exact"

    def __post_init__(self) -> None:
        check_normalization(self.normalize)

    def check(self) -> None:
        """Do nothing: no package is needed."""

    def prediction(self, score: Score) -> str:
        """Return the text of the choice with the highest score."""
        return score.request.choices[score.chosen(self.normalize)].strip()


def _f1(prediction: str, answer: str) -> float:
    words, accepted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    shared = (Counter(words) & Counter(accepted)).total()
    return 2 * shared / (len(words) + len(accepted)) if shared else 0.0


@lru_cache
def _lemmatizer(language: str) -> Callable[[str], str]:
    try:
        from simplemma import lemmatize, simple_tokenizer
    except ImportError:
        raise OptionError("lemmas need one more package: pip install 'flexmask[lemma]'") from None
    try:
        lemmatize("word", lang=language)
    except ValueError:
        raise OptionError(f"simplemma has no lemmas of the language {language!r}") from None

    @lru_cache(maxsize=65536)  # accepted answers recur from row to row
    def lemmas(text: str) -> str:
        # Before case folding, because simplemma finds German nouns by their capital letter.
        words = (lemmatize(word, lang=language) for word in simple_tokenizer(text))
        return normalize_answer(" ".join(words))

    return lemmas
