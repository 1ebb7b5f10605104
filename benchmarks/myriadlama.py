"""Turns MyriadLAMA rows into requests: ``python benchmarks/myriadlama.py ROWS PREFIX > REQUESTS``.

Each row becomes a request whose segments are the first five of its manual and automatic
paraphrases. Its prefix is the instruction and few-shot examples in the file PREFIX. With
``--choices`` it also has four choices: its first accepted answer, and those of three other rows
about the same relation.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PARAPHRASES = 5
CHOICES = 4

Row = Mapping[str, Any]


def main() -> None:
    """Write one JSON object per row to standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="rows of MyriadLAMA, as JSON Lines")
    parser.add_argument("prefix", type=Path, help="instruction and few-shot examples")
    parser.add_argument("--choices", action="store_true", help="add four choices to each row")
    arguments = parser.parse_args()
    shared = arguments.prefix.read_text(encoding="utf-8").rstrip("\n") + "\n\n"
    rows = [json.loads(line) for line in arguments.rows.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        request = _request(row, shared)
        if arguments.choices:
            request |= _choices(row, rows)
        print(json.dumps(request, ensure_ascii=False))


def _request(row: Row, prefix: str) -> dict[str, Any]:
    paraphrases = row["manual_paraphrases"] + row["auto_paraphrases"]
    return {
        "uuid": row["uuid"],
        "prefix": prefix,
        "segments": [f"Q: {text}" for text in paraphrases[:PARAPHRASES]],
        "suffix": "\nA:",
        "answers": row["answers"],
    }


def _choices(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """Draw wrong answers, which are right in other rows, and shuffle; drawn by the row's id."""
    right = row["answers"][0]
    known = {answer.casefold() for answer in row["answers"]}
    wrong = {other["answers"][0] for other in rows if _relation(other) == _relation(row)}
    wrong = {answer for answer in wrong if answer.casefold() not in known}
    if len(wrong) < CHOICES - 1:  # a relation with few rows; others are easier to tell apart
        wrong |= {other["answers"][0] for other in rows} - set(row["answers"])
    draw = random.Random(row["uuid"])
    choices = [right, *draw.sample(sorted(wrong), CHOICES - 1)]
    draw.shuffle(choices)
    return {"choices": [f" {choice}" for choice in choices], "answer": choices.index(right)}


def _relation(row: Row) -> str:
    """The first part of a row's id, which the rows about one relation share."""
    relation: str = row["uuid"].split("-")[0]
    return relation


if __name__ == "__main__":
    main()
