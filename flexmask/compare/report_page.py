"""Renders the report as one self-contained page: table, plot, and the answers of two cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from flexmask.compare.comparison_run import ReportFolder
from flexmask.compare.table import COSTS, CellResult
from flexmask.results.result_writer import read_finished_rows
from flexmask.results.schema import answer_logprob
from flexmask.show import palette
from flexmask.tasks.judge import ChoiceJudge, Judge
from flexmask.web_page import render_page

SCRIPTS = ("table.js", "plot.js", "answers.js", "page.js")
METRIC_NAMES = {"exact": "accuracy", "f1": "F1", "lemma": "lemma match"}

NOTES = (
    "Intervals: 95%, bootstrap over questions; differences are paired with the first row.",
    "Times exclude batches in which something was compiled. First token: time from the start of a "
    "batch to its first tokens.",
    "Computed: prompt tokens that were not reused from the prefix cache.",
)
CPU_NOTE = "Peak memory is measured on a GPU."


def report_html(
    title: str,
    facts: Mapping[str, str],
    results: Sequence[CellResult],
    folder: ReportFolder,
    judge: Judge | ChoiceJudge,
) -> str:
    """Return the HTML of the page.

    Args:
        title: Title of the comparison.
        facts: Model, input, generation and machine, by name.
        results: Rows of the table.
        folder: Folder of the result files.
        judge: The judge that scored the answers.
    """
    has_peak = any(each.measurement and each.measurement.peak_bytes for each in results)
    notes = [*NOTES, *([] if has_peak else [CPU_NOTE])]
    return render_page(
        "flexmask.compare",
        SCRIPTS,
        style=_colours(),
        data=_data(results, folder) | {"metric": METRIC_NAMES.get(judge.metric, judge.metric)},
        title=title,
        facts=facts,
        notes=notes,
    )


def _colours() -> str:
    colours = [
        f".series-{number} {{--series: var(--segment-{number});}}"
        for number in range(len(palette.SEGMENT_COLOURS))
    ]
    names = [f"--segment-{n}: {colour};" for n, colour in enumerate(palette.SEGMENT_COLOURS)]
    return ":root {" + "".join(names) + "}\n" + "\n".join(colours) + "\n"


class _Numbers:
    """Assigns numbers to texts in order of appearance; equal texts share a number."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.of.setdefault(text, len(self.of))


class _Answer(NamedTuple):
    """The answer to a question: its text, its score, and its log-probability if it was kept."""

    text: str
    score: float | None
    logprob: float | None


def _data(results: Sequence[CellResult], folder: ReportFolder) -> dict[str, Any]:
    texts, shared = _Numbers(), _Numbers()
    questions: dict[str, dict[str, Any]] = {}
    answers = [_answers(result, folder, questions, shared) for result in results]
    cells = []
    for result, by_uuid in zip(results, answers, strict=True):
        given = [by_uuid[uuid] for uuid in questions] if by_uuid else []
        logprobs = [answer.logprob for answer in given]
        cells.append(
            _figures(result)
            | {
                "answers": [texts(answer.text) for answer in given],
                "scores": [answer.score for answer in given],
                "logprobs": [] if set(logprobs) <= {None} else logprobs,
            }
        )
    return {
        "cells": cells,
        "questions": list(questions.values()),
        "texts": list(texts.of),
        "shared": list(shared.of),
        "isJudged": any(result.score for result in results),
    }


def _figures(result: CellResult) -> dict[str, Any]:
    figures = result.figures()
    names = ("name", "num_segments", "same", "error", "score", "difference", "mean_logprob")
    cell = result.cell
    return {name: figures[name] for name in (*names, *COSTS)} | {
        "title": cell.title,
        "segments": cell.way.segments,
    }


def _answers(
    result: CellResult,
    folder: ReportFolder,
    questions: dict[str, dict[str, Any]],
    shared: _Numbers,
) -> dict[str, _Answer]:
    """Return the answer to each question; add new questions and segments to the dict."""
    if result.error:
        return {}
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for row in read_finished_rows(folder.rows(result.cell)).to_pylist():
        rows_of.setdefault(row["uuid"], []).append(row)
    for uuid, rows in rows_of.items():
        segments = list(dict.fromkeys(text for row in rows for text in row["paraphrases"]))
        question = questions.setdefault(uuid, _question(rows[0], shared))
        if len(segments) > len(question["segments"]):
            question["segments"] = segments
    return {
        uuid: _Answer(_text(rows), _score(rows), _logprob(rows)) for uuid, rows in rows_of.items()
    }


def _question(row: Mapping[str, Any], shared: _Numbers) -> dict[str, Any]:
    return {
        "uuid": row["uuid"],
        "prefix": shared(row["prefix"]),
        "suffix": shared(row["suffix"]),
        "segments": [],
        "answers": row["answers"],
    }


def _text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the answer; if each prompt has its own, all of them."""
    return " | ".join(f"({row['error']})" if row["error"] else row["prediction"] for row in rows)


def _score(rows: Iterable[Mapping[str, Any]]) -> float | None:
    scores = [row["score"] for row in rows]
    return None if None in scores else fmean(scores)


def _logprob(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the log-probability of the answer; None if each prompt has its own."""
    logprobs, *others = map(answer_logprob, rows)
    return None if logprobs is None or others else round(logprobs, 3)
