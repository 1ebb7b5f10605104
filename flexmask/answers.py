"""Normalization of answers, so that two that differ in spelling alone are equal.

It is that of SQuAD (Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250), extended to
Unicode. On ASCII text the two agree, except for answers of which SQuAD's leaves nothing.
"""

from __future__ import annotations

import re
import string
import unicodedata

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower the case, remove punctuation and English articles, and leave single spaces.

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


def _unified(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _is_dropped(character: str) -> bool:
    if character in string.punctuation:
        return True
    category = unicodedata.category(character)
    return category.startswith("P") or category == "Cf"  # Cf: zero-width and other invisibles
