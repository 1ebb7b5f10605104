"""``benchmarks/document_questions.py`` draws what it says, and the same each time."""

import json
import sys
from collections import Counter

import pytest

import document_questions
from document_questions import Fact, draw_questions, make_documents, read_facts

FACTS = [
    Fact((f"answer{n}",), tuple(f"{way} fact {n} is [MASK]." for way in ("The", "A", "Some")))
    for n in range(40)
]


def words(text):
    return len(text.split()) + text.count("\n")


@pytest.fixture(scope="module")
def documents():
    return make_documents(FACTS, words, count=20, num_tokens=64, seed=3)


def test_documents_tell_facts_and_are_full(documents):
    assert documents == make_documents(FACTS, words, count=20, num_tokens=64, seed=3)
    assert len({document.text for document in documents}) == 20
    for document in documents:
        assert 64 - 5 < words(document.text) <= 64
        told = [FACTS[f].sentences[i].replace("[MASK]", f"answer{f}") for f, i in document.told]
        assert document.text.endswith(f": {' '.join(told)}\n\n")
    with pytest.raises(ValueError, match="no sentence fits into 7 tokens"):
        make_documents(FACTS, words, count=1, num_tokens=7, seed=3)


def test_questions_ask_for_what_a_document_tells_and_popular_documents_come_more_often(documents):
    options = {"count": 4000, "per_question": 3}
    questions = draw_questions(FACTS, documents, **options, seed=1)
    assert questions == draw_questions(FACTS, documents, **options, seed=1)
    assert questions != draw_questions(FACTS, documents, **options, seed=2)
    drawn = Counter(segment for question in questions for segment in question.segments)
    assert sum(drawn.values()) == 4000 * len(set(questions[0].segments)) == 12000
    for question in questions[:50]:
        (fact,) = (fact for fact in FACTS if fact.answers == question.answers)
        assert any(f"{question.answers[0]}." in segment for segment in question.segments)
        assert any(text in question.suffix for text in fact.sentences)
    firsts = Counter(question.segments[0] for question in questions)
    ratio = firsts[documents[0].text] / firsts[documents[9].text]
    assert ratio == pytest.approx(10**0.8, rel=0.2)  # rank 1 and rank 10
    with pytest.raises(ValueError, match="21 documents a question, but there are 20"):
        draw_questions(FACTS, documents, count=1, per_question=21, seed=1)


def test_requests_and_whole_prompts_are_of_the_same_questions(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"answers": fact.answers, "manual_paraphrases": fact.sentences, "auto_paraphrases": ["?"]}
        for fact in FACTS
    ]
    rows.write_text("\n".join(map(json.dumps, lines)))
    assert read_facts(rows.read_text().splitlines()) == FACTS

    def printed(*arguments):
        sizes = ("--documents", "9", "--questions", "4", "--tokens", "90")
        monkeypatch.setattr(sys, "argv", ["document_questions.py", *arguments, *sizes])
        document_questions.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    requests, prompts = printed(str(rows)), printed(str(rows), "--prompts")
    assert len(requests) == 4
    for request, prompt in zip(requests, prompts, strict=True):
        assert len(request["segments"]) == 8
        text = request["prefix"] + "".join(request["segments"]) + request["suffix"]
        assert prompt == {k: request[k] for k in ("uuid", "answers")} | {"prompt": text}
    with pytest.raises(SystemExit):
        printed(str(tmp_path / "absent"))
    assert "there is no file" in capsys.readouterr().err
