"""Draws questions about documents: ``python benchmarks/document_questions.py ROWS > REQUESTS``.

Rows are those of MyriadLAMA: facts, with sentences that tell each of them. A document is a list of
such sentences about different facts. A question comes with some documents, popular ones more
often, and asks for a fact in one of them, in other words where there are any. The same arguments
give the same questions.

Each line is a request for flexmask, whose segments are the documents; with ``--prompts`` it is the
same text as one prompt, for engines that know no segments.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from transformers import AutoTokenizer

from flexmask.demo import model_path

PREFIX = "Read the documents and answer with the one word that [MASK] stands for.\n\n"
MASK = "[MASK]"
EXPONENT = 0.8
"""The document of rank ``n`` is drawn as often as ``n ** -EXPONENT``."""


@dataclass(frozen=True)
class Fact:
    """A fact: the words that are asked for, and sentences in which `MASK` stands for them."""

    answers: tuple[str, ...]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A document.

    Attributes:
        text: Its sentences, with a title line and an empty line at the end.
        told: Fact and sentence, by their indices, of each of its sentences.
    """

    text: str
    told: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Question:
    """A request in the columns that `flexmask.read_requests` reads."""

    uuid: str
    prefix: str
    segments: tuple[str, ...]
    suffix: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The whole text."""
        return "".join((self.prefix, *self.segments, self.suffix))


def read_facts(lines: Sequence[str]) -> list[Fact]:
    """Return the facts of MyriadLAMA's rows that have an answer and a sentence."""
    facts = []
    for line in lines:
        row = json.loads(line)
        told = (*row["manual_paraphrases"], *row["auto_paraphrases"])
        sentences = tuple(dict.fromkeys(text for text in told if MASK in text))
        if sentences and row["answers"]:
            facts.append(Fact(tuple(row["answers"]), sentences))
    return facts


def make_documents(
    facts: Sequence[Fact],
    count_tokens: Callable[[str], int],
    *,
    count: int,
    num_tokens: int,
    seed: int,
) -> list[Document]:
    """Make documents of sentences in random order; a sentence returns once all were used.

    Args:
        facts: What is told.
        count_tokens: The number of tokens of a text that continues another one.
        count: Number of documents.
        num_tokens: Most tokens of each; one sentence less is too few.
        seed: Seed of the order.
    """
    draw = random.Random(seed)
    sentences = [(n, i) for n, fact in enumerate(facts) for i in range(len(fact.sentences))]
    waiting: list[tuple[int, int]] = []
    documents = []
    for number in range(1, count + 1):
        text, told = f"Document {number:03}:", list[tuple[int, int]]()
        left = num_tokens - count_tokens(text) - count_tokens("\n\n")
        while True:
            if not waiting:
                waiting = draw.sample(sentences, len(sentences))
            fact, index = waiting[-1]
            sentence = " " + facts[fact].sentences[index].replace(MASK, facts[fact].answers[0])
            left -= count_tokens(sentence)
            if left < 0:
                break
            text += sentence
            told.append(waiting.pop())
        if not told:
            raise ValueError(f"no sentence fits into {num_tokens} tokens")
        documents.append(Document(f"{text}\n\n", tuple(told)))
    return documents


def draw_questions(
    facts: Sequence[Fact],
    documents: Sequence[Document],
    *,
    count: int,
    per_question: int,
    seed: int,
) -> list[Question]:
    """Draw questions with ``per_question`` different documents each; the first are popular."""
    if per_question > len(documents):
        raise ValueError(f"{per_question} documents a question, but there are {len(documents)}")
    draw = random.Random(seed)
    weights = list(accumulate((rank + 1) ** -EXPONENT for rank in range(len(documents))))
    questions = []
    for number in range(count):
        drawn: dict[int, Document] = {}
        while len(drawn) < per_question:
            (rank,) = draw.choices(range(len(documents)), cum_weights=weights)
            drawn.setdefault(rank, documents[rank])
        fact, told = draw.choice(draw.choice([*drawn.values()]).told)
        others = [text for i, text in enumerate(facts[fact].sentences) if i != told]
        asked = draw.choice(others or facts[fact].sentences)
        questions.append(
            Question(
                f"question{number}",
                PREFIX,
                tuple(document.text for document in drawn.values()),
                f"Q: {asked}\nA:",
                facts[fact].answers,
            )
        )
    return questions


def main() -> None:
    """Write one JSON object per question to standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="myriadlama_1000.jsonl")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=512, help="most tokens of a document")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--per-question", type=int, default=8, help="documents of a question")
    parser.add_argument("--tokenizer", default=model_path(), help="default: the bundled one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", action="store_true", help="write whole prompts")
    options = parser.parse_args()
    if not options.rows.is_file():
        parser.error(f"there is no file {options.rows}")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    facts = read_facts(options.rows.read_text(encoding="utf-8").splitlines())
    if not facts:
        parser.error(f"{options.rows} holds no fact with an answer and a sentence")

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    try:
        documents = make_documents(
            facts,
            count_tokens,
            count=options.documents,
            num_tokens=options.tokens,
            seed=options.seed,
        )
        questions = draw_questions(
            facts,
            documents,
            count=options.questions,
            per_question=options.per_question,
            seed=options.seed,
        )
    except ValueError as error:
        parser.error(str(error))
    for question in questions:
        whole = {"uuid": question.uuid, "prompt": question.prompt, "answers": question.answers}
        record = whole if options.prompts else asdict(question)
        print(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    main()
