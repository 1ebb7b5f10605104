"""Compares a prediction with the accepted answers, as texts.

Answers are normalized before they are compared (`flexmask.answers`). Token F1 is SQuAD's
(Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache

import regex

from flexmask.answers import normalize_answer
from flexmask.errors import OptionError

_LETTER = (
    r"[\p{L}\p{M}\p{N}--"
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]"
)
"""A letter or digit of a script that puts spaces between words."""
_EDGE = rf"(?:(?<!{_LETTER})|(?!{_LETTER}))"
_END = rf"(?:(?!{_LETTER})|(?<!{_LETTER}))"


def is_exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Return True if a prediction equals one of the answers after normalization.

    An empty prediction matches nothing.
    """
    normalized = normalize_answer(prediction)
    return bool(normalized) and any(normalized == normalize_answer(answer) for answer in answers)


def contains_answer(prediction: str, answers: Iterable[str]) -> bool:
    """Return True if a prediction contains one of the answers as whole words, both normalized.

    This is the accuracy of Liu et al., 2023 (https://arxiv.org/abs/2307.03172), except that an
    answer is not found inside a word. Scripts without spaces between words have no such limit.

    Example:
        >>> contains_answer("It is the city of Paris.", ["Paris"])
        True
        >>> contains_answer("A Parisian.", ["Paris"])
        False
        >>> contains_answer("答えは東京です", ["東京"])
        True
    """
    text = normalize_answer(prediction)
    return any(_is_within(normalize_answer(answer), text) for answer in answers)


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
        OptionError: As `lemmatizer`.
    """
    lemmatize = lemmatizer(language)
    found = lemmatize(prediction)
    return is_exact_match(prediction, answers) or (
        bool(found) and any(found == lemmatize(answer) for answer in answers)
    )


@lru_cache
def lemmatizer(language: str) -> Callable[[str], str]:
    """Return the function that replaces the words of a text by their lemmas, and normalizes it.

    Raises:
        OptionError: If ``simplemma`` is not installed, or does not know ``language``, an ISO 639
            code.
    """
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


def _is_within(answer: str, text: str) -> bool:
    if not answer or answer not in text:
        return False
    pattern = f"{_EDGE}{regex.escape(answer)}{_END}"
    return regex.search(pattern, text, flags=regex.VERSION1) is not None


def _f1(prediction: str, answer: str) -> float:
    words, accepted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    shared = (Counter(words) & Counter(accepted)).total()
    return 2 * shared / (len(words) + len(accepted)) if shared else 0.0
