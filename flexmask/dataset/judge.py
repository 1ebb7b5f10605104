"""Exact match: whether a prediction is one of the accepted answers.

The rule is SQuAD's (Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250), widened to
Unicode; on ASCII text the two agree, but for answers of which SQuAD's leaves nothing.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces.

    Compatibility forms are unified (NFKC), so that a composed ``ñ`` equals ``n`` and a
    combining tilde; accents stay. Text made of nothing but articles or punctuation keeps them:
    the answers ``A`` and ``+`` are not empty.

    Example:
        >>> normalize_answer("The  Big Smoke!")
        'big smoke'
        >>> normalize_answer("«Российская Федерация»")
        'российская федерация'
    """
    folded = _unified(_unified(text).casefold())
    words = _unified("".join(character for character in folded if not _is_dropped(character)))
    for candidate in (_ARTICLES.sub(" ", words), words, folded):
        if normalized := " ".join(candidate.split()):
            return normalized
    return ""


def is_exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Whether a prediction equals one of the answers once both are normalized.

    An empty prediction matches nothing.
    """
    normalized = normalize_answer(prediction)
    return bool(normalized) and any(normalized == normalize_answer(answer) for answer in answers)


def _unified(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _is_dropped(character: str) -> bool:
    if character in string.punctuation:
        return True
    category = unicodedata.category(character)
    return category.startswith("P") or category == "Cf"  # Cf: zero-width and other invisibles
