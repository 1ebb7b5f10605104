"""The columns of a result file, and the row of a generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain, product
from typing import Any

import pyarrow as pa

from flexmask.choice_scores import ChoiceScore, Score
from flexmask.errors import JudgeError
from flexmask.fusion import VOTES, Fusion
from flexmask.generation import Generation
from flexmask.request import RequestKey
from flexmask.tasks.judge import ChoiceJudge, Judge
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

SCORE_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("choices", pa.list_(pa.string())),
        ("answer", pa.int32()),
        ("chosen", pa.int32()),
        ("is_tie", pa.bool_()),
        ("logprobs", pa.list_(pa.float64())),
        ("token_logprobs", pa.list_(pa.list_(pa.float64()))),
        ("tokens", pa.list_(pa.int32())),
        ("bytes", pa.list_(pa.int32())),
        ("is_greedy", pa.list_(pa.bool_())),
    ]
)
"""Columns of a result file of scores: ``answer`` is the index of the right choice, null where it
is not known, ``chosen`` that of the one with the highest value, and ``is_tie`` says that another
has the same. The lists hold an item for each choice: the natural logarithm of its probability,
those of its tokens, numbers of tokens and bytes, and whether greedy decoding would have generated
it (null where prompts are fused). ``prediction`` is the chosen choice, and ``correct`` compares
its index with the answer's. Rows that failed have nulls from ``chosen`` on."""

ASKED_FOR: dict[str, dict[str, pa.DataType]] = {
    "sample": {"sample": pa.int32()},
    "segment_attention": {"segment_attention": pa.list_(pa.list_(pa.float32()))},
    "logprobs": {"token_ids": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float64())},
    "top_logprobs": {
        "top_logprobs": pa.list_(
            pa.list_(
                pa.struct(
                    [("token_id", pa.int32()), ("text", pa.string()), ("logprob", pa.float64())]
                )
            )
        )
    },
}
"""Columns that a run's generations have where they are asked for. ``sample`` is the number of the
generation, from 0, where prompts have several; the others go by the options of
`flexmask.Engine.generate` that ask for them, and are null where a row failed."""


def generation_schema(asked_for: Collection[str]) -> pa.Schema:
    """Return the columns of generations: `SCHEMA`, and those that were asked for.

    Other files are as they were before there were such columns.

    Args:
        asked_for: Keys of `ASKED_FOR`.
    """
    more = [columns.items() for name, columns in ASKED_FOR.items() if name in asked_for]
    return pa.schema([*SCHEMA, *chain.from_iterable(more)])


_ALL_ASKED_FOR = product(*([(), (name,)] for name in ASKED_FOR))

SCHEMAS = {
    tuple(schema.names): schema
    for schema in (
        *(generation_schema([*chain.from_iterable(names)]) for names in _ALL_ASKED_FOR),
        SCORE_SCHEMA,
    )
}
"""The schemas of result files by the names of their columns."""

SCORED = "scored"
"""Finish reason of a row whose choices were scored."""

NEVER_NULL = (
    *("uuid", "answers", "paraphrases", "prediction", "generation", "prefix", "suffix"),
    *("system", "messages", "answer_prefix", "segment_turns"),
    *("prompt_tokens", "generated_tokens", "finish_reason", "sample"),
)
"""Columns that are never null where a file has them; the items of their lists are not either."""


Result = Generation | Score | BadRow


def schema_of(
    judge: Judge | ChoiceJudge, fusion: Fusion, asked_for: Collection[str] = ()
) -> pa.Schema:
    """Return the columns of the rows of a run.

    Args:
        judge: The judge of its rows.
        fusion: Its fusion.
        asked_for: Options of the engine that ask for columns, keys of `ASKED_FOR`.
    """
    if isinstance(judge, ChoiceJudge):
        return SCORE_SCHEMA
    return generation_schema([*asked_for, *(["sample"] if fusion.has_sample_rows else [])])


def recorded_schema(run: Mapping[str, Any]) -> pa.Schema:
    """Return the columns that the rows of a run have, by its record."""
    if "scores" in run:
        return SCORE_SCHEMA
    fusion = run.get("fusion", {})  # early versions had no fusions
    has_samples = "samples" in fusion and fusion.get("name") not in VOTES
    asked_for = [name for name in ASKED_FOR if name in run]
    return generation_schema([*asked_for, *(["sample"] if has_samples else [])])


def row_of(result: Result, judge: Judge | ChoiceJudge) -> dict[str, Any]:
    """Return the row of a result, or of a bad row, which has no text and counts as wrong.

    It has the columns of any run with this judge, those that were not asked for too.

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
        "sample": request.sample if request else 0,
        **dict.fromkeys(("segment_attention", "token_ids", "logprobs", "top_logprobs")),
        "weights": (request.weights or None) if request else None,
    }
    if isinstance(judge, ChoiceJudge):
        row |= {
            "choices": request.choices if request else (),
            "answer": request.answer if request else None,
            "chosen": None,
        }
    if isinstance(result, BadRow):
        row |= {"prediction": "", "generation": "", "prompt_tokens": 0, "generated_tokens": 0}
        # It may quote a lone surrogate, which Arrow does not store.
        error = result.error.encode(errors="backslashreplace").decode()
        row |= {"finish_reason": FAILED, "error": error}
    elif isinstance(result, Score):
        assert isinstance(judge, ChoiceJudge)
        row |= _columns_of(result, judge)
    else:
        assert isinstance(judge, Judge)
        row |= {
            "prompts": result.prompts,
            "prediction": judge.prediction(result),
            "generation": result.text,
            "prompt_tokens": result.prompt_tokens,
            "generated_tokens": len(result.token_ids),
            "finish_reason": result.finish_reason,
            "error": None,
            "segment_attention": result.segment_attention,
            "token_ids": result.token_ids,
            "logprobs": result.logprobs,
            "top_logprobs": result.top_logprobs
            and [[one._asdict() for one in of_token] for of_token in result.top_logprobs],
        }
    try:
        return row | verdict(row, judge)
    except JudgeError as error:
        raise JudgeError(f"{request.label if request else row['uuid']}: {error}") from error


def key_of(row: Mapping[str, Any]) -> RequestKey:
    """Return the key of a row; without samples it has no such column."""
    return RequestKey(row["uuid"], row["segment"], row.get("sample", 0))


def answer_logprobs(row: Mapping[str, Any]) -> Sequence[float] | None:
    """Return the log-probabilities of the tokens of a row's answer, generated or chosen.

    None if they were not kept, or the row failed.
    """
    if "choices" not in row:
        return row.get("logprobs") or None
    of_choices: Sequence[Sequence[float]] | None = row["token_logprobs"]
    return None if of_choices is None else of_choices[row["chosen"]]


def answer_logprob(row: Mapping[str, Any]) -> float | None:
    """Return the log-probability of a row's answer, generated or chosen.

    None if it was not kept, the row failed, or the answer is impossible, as all choices are then.
    """
    of_tokens = answer_logprobs(row)
    if of_tokens is None or -math.inf in of_tokens:
        return None
    return math.fsum(of_tokens)


def _columns_of(score: Score, judge: ChoiceJudge) -> dict[str, Any]:
    def of_each(value: Callable[[ChoiceScore], Any]) -> list[Any]:
        return [value(choice) for choice in score.choices]

    return {
        "prediction": judge.prediction(score),
        "generation": "",
        "prompt_tokens": score.prompt_tokens,
        "generated_tokens": 0,
        "finish_reason": SCORED,
        "error": None,
        "chosen": score.chosen(judge.normalize),
        "is_tie": score.is_tie(judge.normalize),
        "logprobs": of_each(lambda choice: choice.logprob),
        "token_logprobs": of_each(lambda choice: choice.token_logprobs),
        "tokens": of_each(lambda choice: choice.num_tokens),
        "bytes": of_each(lambda choice: choice.num_bytes),
        "is_greedy": of_each(lambda choice: choice.is_greedy),
    }


def verdict(row: Mapping[str, Any], judge: Judge | ChoiceJudge) -> dict[str, Any]:
    """Return the columns ``correct`` and ``score`` of a row, which depend on right answers."""
    if isinstance(judge, ChoiceJudge):
        is_right = None if row["answer"] is None else row["chosen"] == row["answer"]
        return {"correct": is_right, "score": None if is_right is None else float(is_right)}
    prediction, answers = row["prediction"], row["answers"]
    if not answers:
        return {"correct": None, "score": None}
    return {
        "correct": is_exact_match(prediction, answers),
        "score": judge.score(prediction, answers),
    }
