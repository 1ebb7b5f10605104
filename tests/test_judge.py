import re
import string
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmask.answers import normalize_answer
from flexmask.tasks.matching import is_exact_match


def squad_normalize_answer(text: str) -> str:
    """The function of SQuAD's official evaluation script."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@given(st.text(alphabet=string.printable))
def test_ascii_text_is_normalized_as_squad_does(text: str) -> None:
    expected = squad_normalize_answer(text)
    if expected:
        assert normalize_answer(text) == expected


@given(st.text())
def test_normalizing_twice_changes_nothing_more(text: str) -> None:
    once = normalize_answer(text)
    if not re.search(r"\b(a|an|the)\b", once):  # "a-n x" becomes "an x", as with SQuAD
        assert normalize_answer(once) == once


@given(st.text())
def test_composed_and_decomposed_forms_are_one_answer(text: str) -> None:
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert normalize_answer(composed) == normalize_answer(decomposed)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("london", "London"),
        (" The London. ", "London"),
        ("London,\tUK", "London UK"),
        ("LON\N{COMBINING TILDE}", "Lo\N{LATIN SMALL LETTER N WITH TILDE}"),
        ("российская федерация", "Российская Федерация"),
        ("«Российская Федерация».", "Российская Федерация"),
        ("“Big Smoke”", "the Big Smoke"),
        ("STRASSE", "Straße"),
        ("\uff11\uff19\uff18\uff14", "1984"),  # full-width digits
        ("Saint\u00a0Petersburg", "Saint Petersburg"),
        ("soft\u00adhyphen", "softhyphen"),
        ("東京。", "東京"),
        ("(A)", "A"),
        ("+", "+"),
    ],
)
def test_spellings_of_one_answer_match(prediction: str, answer: str) -> None:
    assert is_exact_match(prediction, [answer])


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("Lon", "Loñ"),
        ("London, Ontario", "London"),
        ("Theology", "ology"),
        ("the", "A"),
        ("-", "+"),
        ("", "London"),
        ("", ""),
        (" \n", "."),
    ],
)
def test_other_answers_do_not_match(prediction: str, answer: str) -> None:
    assert not is_exact_match(prediction, [answer])


def test_any_of_several_answers_is_enough() -> None:
    assert is_exact_match("Beyrout", ["Beirut", "Beyrout"])
    assert not is_exact_match("Beyrout", ["Beirut", "Tyre"])
    assert not is_exact_match("Beyrout", [])
