"""The columns of a result file, and the row of a generation."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from flexmask.errors import JudgeError
from flexmask.generation import Generation
from flexmask.tasks.judge import Judge
from flexmask.tasks.matching import is_exact_match
from flexmask.tasks.request_source import BadRow

RUN = b"flexmask"
"""Key of the schema metadata under which the run configuration is stored as JSON."""

FAILED = "error"
"""Finish reason of a row that could not be generated."""

SCHEMA = pa.schema(
    [
        ("uuid", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("paraphrases", pa.list_(pa.string())),
        ("prediction", pa.string()),
        ("generation", pa.string()),
        ("prefix", pa.string()),
        ("suffix", pa.string()),
        ("system", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("answer_prefix", pa.string()),
        ("segment_turns", pa.string()),
        ("prompts", pa.list_(pa.string())),
        ("segment", pa.int32()),
        ("weights", pa.list_(pa.float64())),
        ("prompt_tokens", pa.int32()),
        ("generated_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("correct", pa.bool_()),
        ("score", pa.float64()),
        ("error", pa.string()),
    ]
)
"""Columns of a result file: ``paraphrases`` holds the segments; ``prompts`` the texts that a chat
template made of the request, null without one; ``segment`` is the number of the
segment that was run alone, else null; ``weights`` are those of the segments, or null; ``correct``
is exact match and ``score`` the judge's score, both null where there are no answers; ``error`` is
the reason why a row failed, else null."""

NEVER_NULL = (
    *("uuid", "answers", "paraphrases", "prediction", "generation", "prefix", "suffix"),
    *("system", "messages", "answer_prefix", "segment_turns"),
    *("prompt_tokens", "generated_tokens", "finish_reason"),
)
"""Columns that are never null; the items of their lists are not null either."""


def row_of(result: Generation | BadRow, judge: Judge) -> dict[str, Any]:
    """Return the row of a generation, or of a bad row, which has no text and counts as wrong.

    Raises:
        JudgeError: If the judge does not apply to the row, or fails on it; the message names it.
    """
    request = result.request
    row: dict[str, Any] = {
        "uuid": result.uuid if isinstance(result, BadRow) else result.request.uuid,
        "answers": request.answers if request else (),
        "paraphrases": request.segments if request else (),
        "prefix": request.prefix if request else "",
        "suffix": request.suffix if request else "",
        "system": request.system if request else "",
        "messages": [vars(message) for message in request.messages] if request else (),
        "answer_prefix": request.answer_prefix if request else "",
        "segment_turns": request.segment_turns if request else "one",
        "prompts": None,
        "segment": request.segment if request else None,
        "weights": (request.weights or None) if request else None,
    }
    if isinstance(result, BadRow):
        row |= {"prediction": "", "generation": "", "prompt_tokens": 0, "generated_tokens": 0}
        # It may quote a lone surrogate, which Arrow does not store.
        error = result.error.encode(errors="backslashreplace").decode()
        row |= {"finish_reason": FAILED, "error": error}
    else:
        row |= {
            "prompts": result.prompts,
            "prediction": judge.prediction(result),
            "generation": result.text,
            "prompt_tokens": result.prompt_tokens,
            "generated_tokens": len(result.token_ids),
            "finish_reason": result.finish_reason,
            "error": None,
        }
    try:
        return row | verdict(row["prediction"], row["answers"], judge)
    except JudgeError as error:
        raise JudgeError(f"{request.label if request else row['uuid']}: {error}") from error


def verdict(prediction: str, answers: tuple[str, ...], judge: Judge) -> dict[str, Any]:
    """Return the columns ``correct`` and ``score``, which depend on accepted answers."""
    if not answers:
        return {"correct": None, "score": None}
    return {
        "correct": is_exact_match(prediction, answers),
        "score": judge.score(prediction, answers),
    }
