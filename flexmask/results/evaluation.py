"""Scores result files and compares them in pairs, with confidence intervals.

Intervals are percentile bootstraps (Efron, 1979) over questions. Comparisons are paired: each
resample holds the same questions for both files, so that the difficulty of a question cancels out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from flexmask.errors import JudgeError, OutputError
from flexmask.results.result_writer import read_finished_rows
from flexmask.results.run_config import RunConfig
from flexmask.results.schema import FAILED, RUN
from flexmask.tasks.judge import CUTS, Judge

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% confidence interval.

    Attributes:
        mean: Mean over the questions.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    mean: float
    low: float
    high: float


def estimate_mean(scores: Iterable[float]) -> Estimate:
    """Return the mean of scores with its bootstrap interval; deterministic.

    A resample counts how often each distinct score is drawn, so a million questions cost the same
    as a thousand.

    Raises:
        ValueError: If there are no scores.
    """
    counts = Counter(scores)
    total = counts.total()
    if not total:
        raise ValueError("a mean needs at least one score")
    values = np.array(sorted(counts))
    shares = np.array([counts[value] for value in values]) / total
    draws = np.random.default_rng(0).multinomial(total, shares, size=RESAMPLES)
    low, high = np.quantile(draws @ values / total, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(shares @ values), float(low), float(high))


def scores_by_question(uuids: Iterable[str], scores: Iterable[float]) -> dict[str, float]:
    """Return the score of each question: the mean over its rows, one for each prompt."""
    of_rows = defaultdict(list)
    for uuid, score in zip(uuids, scores, strict=True):
        of_rows[uuid].append(score)
    return {uuid: fmean(values) for uuid, values in of_rows.items()}


@dataclass(frozen=True)
class Evaluation:
    """The scores of one result file.

    Attributes:
        path: The file.
        rows: Number of rows.
        failed: Number of rows that could not be generated; wrong if they have answers.
        answers: By uuid, the accepted answers of the questions that have any.
        scores: By metric, the scores of these questions, in the order of ``answers``.
        estimates: By metric, the mean score.
    """

    path: Path
    rows: int
    failed: int
    answers: Mapping[str, tuple[str, ...]]
    scores: Mapping[str, Sequence[float]]
    estimates: Mapping[str, Estimate]


class _JudgedRow(NamedTuple):
    """A row that has accepted answers, and its number from 1."""

    number: int
    uuid: str
    prediction: str
    answers: Sequence[str]
    generation: str
    correct: bool | None


def evaluate(
    path: Path, metrics: Collection[str], *, language: str = "en", cut: str | None = None
) -> Evaluation:
    """Score the predictions of a result file, or of the journal of an unfinished run.

    Metrics that extract the answer from a text, such as ``regex``, do so again from the whole
    generation; the others score the predictions that the run extracted.

    Args:
        path: The file.
        metrics: Metrics to score by, as `flexmask.tasks.metric.parse_metric` reads them.
        language: Language of the lemmas.
        cut: The part of each generation to judge, from `flexmask.tasks.judge.CUTS`. None leaves
            it as the run cut it.

    Raises:
        OutputError: If it is not a result file, or has no accepted answers.
        OptionError: If there is no such metric or cut.
        JudgeError: If a metric does not apply to a row, or fails on it; the message names it.
    """
    table = read_finished_rows(path)
    names = ("uuid", "prediction", "answers", "generation", "correct")
    columns = (table[name].to_pylist() for name in names)
    rows = enumerate(zip(*columns, strict=True), start=1)
    judged = [_JudgedRow(number, *values) for number, values in rows if values[2]]
    holds_scores = "choices" in table.column_names
    if holds_scores:  # where the right choice is known, and not accepted answers alone
        judged = [row for row in judged if row.correct is not None]
    if not judged:
        raise OutputError(f"{path}: none of its rows has accepted answers to judge by")
    recorded = RunConfig.from_json(table.schema.metadata[RUN]).run.get("judge")
    recorded_cut = recorded.get("cut") if isinstance(recorded, dict) else None
    scores = {}
    for metric in metrics:
        judge = Judge(cut or recorded_cut or CUTS[0], metric, language)
        is_cut_again = cut is not None or judge.parsed.extracts
        of_rows = []
        for row in judged:
            if holds_scores and metric == "exact":
                # Texts that are equal once normalized are two choices nevertheless.
                of_rows.append(float(row.correct or False))
                continue
            text = row.prediction if holds_scores else row.generation
            try:
                prediction = judge.answer_in(text) if is_cut_again else row.prediction
                of_rows.append(judge.score(prediction, row.answers))
            except JudgeError as error:
                raise JudgeError(
                    f"{path}: row {row.number}, uuid {row.uuid!r}: {error}"
                ) from error
        by_question = scores_by_question((row.uuid for row in judged), of_rows)
        scores[metric] = list(by_question.values())
    return Evaluation(
        path=path,
        rows=table.num_rows,
        failed=table["finish_reason"].to_pylist().count(FAILED),
        answers={row.uuid: tuple(row.answers) for row in judged},
        scores=scores,
        estimates={metric: estimate_mean(values) for metric, values in scores.items()},
    )


@dataclass(frozen=True)
class Comparison:
    """Two result files of the same questions, compared by one metric.

    Attributes:
        metric: Name of the metric.
        first: The first file.
        second: The second file.
        difference: Mean score of the second minus that of the first, question by question.
        first_better: Number of questions on which the first scores higher.
        second_better: Number of questions on which the second scores higher.
    """

    metric: str
    first: Path
    second: Path
    difference: Estimate
    first_better: int
    second_better: int


def compare(evaluations: Sequence[Evaluation]) -> list[Comparison]:
    """Compare every pair of result files.

    Raises:
        OutputError: If they do not hold the same questions.
    """
    aligned = [_aligned(evaluation, evaluations[0]) for evaluation in evaluations]
    return [
        _compared(metric, first, second)
        for first, second in combinations(aligned, 2)
        for metric in first.scores
    ]


def _aligned(evaluation: Evaluation, to: Evaluation) -> Evaluation:
    """Return the evaluation with its questions in the order of another's."""
    ours, theirs = evaluation.answers, to.answers
    problems = [
        f"{len(uuids)} {what} (uuid {uuids[0]!r}{', …' if len(uuids) > 1 else ''})"
        for what, uuids in (
            (f"only in {to.path}", [uuid for uuid in theirs if uuid not in ours]),
            (f"only in {evaluation.path}", [uuid for uuid in ours if uuid not in theirs]),
            ("with other answers", [u for u in ours if ours[u] != theirs.get(u, ours[u])]),
        )
        if uuids
    ]
    if problems:
        raise OutputError(
            f"{evaluation.path}: not the questions of {to.path}: {'; '.join(problems)}; "
            "only runs over the same questions can be compared"
        )
    index_of = {uuid: index for index, uuid in enumerate(ours)}
    order = [index_of[uuid] for uuid in theirs]
    scores = {name: [scores[i] for i in order] for name, scores in evaluation.scores.items()}
    return replace(evaluation, answers=theirs, scores=scores)


def _compared(metric: str, first: Evaluation, second: Evaluation) -> Comparison:
    pairs = zip(first.scores[metric], second.scores[metric], strict=True)
    differences = [b - a for a, b in pairs]
    return Comparison(
        metric=metric,
        first=first.path,
        second=second.path,
        difference=estimate_mean(differences),
        first_better=sum(difference < 0 for difference in differences),
        second_better=sum(difference > 0 for difference in differences),
    )
