"""How an answer is cut from a generation, and how far it is one of the accepted ones.

Answers are normalized before they are compared (`flexmask.answers`). Token F1 is SQuAD's
(Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from flexmask.answers import normalize_answer
from flexmask.errors import OptionError
from flexmask.generation import Generation

CUTS = ("first line", "all")
"""What of a generation is its answer: the first line that is not blank, or all of it."""
METRICS = ("exact", "f1", "lemma")
"""Exact match and token F1 of normalized texts; match of their lemmas, word by word."""


def is_exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Whether a prediction equals one of the answers once both are normalized.

    An empty prediction matches nothing.
    """
    normalized = normalize_answer(prediction)
    return bool(normalized) and any(normalized == normalize_answer(answer) for answer in answers)


def token_f1(prediction: str, answers: Iterable[str]) -> float:
    """Overlap of words with the closest answer: the harmonic mean of precision and recall.

    Example:
        >>> token_f1("the Big Smoke town", ["Big Smoke", "London"])
        0.8
    """
    return max((_f1(prediction, answer) for answer in answers), default=0.0)


def is_lemma_match(prediction: str, answers: Collection[str], language: str = "en") -> bool:
    """Whether a prediction equals one of the answers, as it is or once every word is its lemma.

    Lemmas come from the tables of ``simplemma`` (``pip install 'flexmask[lemma]'``).

    Example:
        >>> is_lemma_match("The rivers", ["river"])
        True

    Raises:
        OptionError: If ``simplemma`` is missing, or does not know ``language``, an ISO 639 code.
    """
    lemmatize = _lemmatizer(language)
    found = lemmatize(prediction)
    return is_exact_match(prediction, answers) or (
        bool(found) and any(found == lemmatize(answer) for answer in answers)
    )


@dataclass(frozen=True)
class Judge:
    """Cuts answers from generations and judges them.

    Attributes:
        cut: One of `CUTS`.
        metric: One of `METRICS`; what `score` is.
        language: Of the lemmas.
    """

    cut: str = CUTS[0]
    metric: str = METRICS[0]
    language: str = "en"

    def __post_init__(self) -> None:
        for name, value, allowed in (("cut", self.cut, CUTS), ("judge", self.metric, METRICS)):
            if value not in allowed:
                raise OptionError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    def check(self) -> None:
        """Raise now what would be raised at the first row.

        Raises:
            OptionError: If lemmas are asked for and cannot be had.
        """
        if self.metric == "lemma":
            _lemmatizer(self.language)

    def prediction(self, generation: Generation) -> str:
        """The answer in a generation."""
        return generation.text.strip() if self.cut == "all" else generation.prediction

    def score(self, prediction: str, answers: Collection[str]) -> float:
        """How right a prediction is, from 0 to 1."""
        if self.metric == "f1":
            return token_f1(prediction, answers)
        if self.metric == "lemma":
            return float(is_lemma_match(prediction, answers, self.language))
        return float(is_exact_match(prediction, answers))


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
        # Before the case is folded: German nouns are not found without their capitals.
        words = (lemmatize(word, lang=language) for word in simple_tokenizer(text))
        return normalize_answer(" ".join(words))

    return lemmas
