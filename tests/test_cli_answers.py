"""The table of answers that `generate` prints."""

from __future__ import annotations

import pytest

from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.tasks.judge import Judge
from flexmask_cli.render.generation import print_answers


def questions(capsys: pytest.CaptureFixture[str], *requests: Request) -> list[str]:
    """The first column of the table."""
    generations = [Generation(request, " Paris\n", (1, 2), "eos", 3) for request in requests]
    print_answers(generations, Judge())
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["question", "prediction"]
    return [line.rpartition("  Paris")[0].strip() for line in lines]


def test_paraphrases_are_questions(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Request((f"Q: Where is {name}?", "Q: other"), "", "\nA:") for name in ("x", "y")]
    assert questions(capsys, *rows) == ["Q: Where is x?", "Q: Where is y?"]


def test_after_documents_the_suffix_is_the_question(capsys: pytest.CaptureFixture[str]) -> None:
    documents = ("A long document. " * 200, "Another one.")
    rows = [Request(documents, "", f"\nName the {name}.\nA:") for name in ("town", "river")]
    assert questions(capsys, *rows) == ["Name the town. A:", "Name the river. A:"]
    alone = Request(documents, "", "\nQ: Which town?\nA:")
    assert questions(capsys, alone) == ["Q: Which town? A:"]
