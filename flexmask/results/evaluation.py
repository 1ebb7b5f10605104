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

import numpy as np

from flexmask.errors import OutputError
from flexmask.results.result_writer import read_finished_rows
from flexmask.results.schema import FAILED
from flexmask.tasks.judge import Judge

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


def evaluate(path: Path, metrics: Collection[str], *, language: str = "en") -> Evaluation:
    """Score the predictions of a result file, or of the journal of an unfinished run.

    Args:
        path: The file.
        metrics: Metrics to score by, from `flexmask.tasks.judge.METRICS`.
        language: Language of the lemmas.

    Raises:
        OutputError: If it is not a result file, or has no accepted answers.
    """
    table = read_finished_rows(path)
    names = ("uuid", "prediction", "answers", "correct")
    columns = (table[name].to_pylist() for name in names)
    judged = [row for row in zip(*columns, strict=True) if row[2]]
    holds_scores = "choices" in table.column_names
    if holds_scores:  # where the right choice is known, and not accepted answers alone
        judged = [row for row in judged if row[3] is not None]
    if not judged:
        raise OutputError(f"{path}: none of its rows has accepted answers to judge by")
    scores = {}
    for metric in metrics:
        judge = Judge(metric=metric, language=language)
        of_rows = [
            # Texts that are equal once normalized are two choices nevertheless.
            float(correct)
            if holds_scores and metric == "exact"
            else judge.score(prediction, answers)
            for _, prediction, answers, correct in judged
        ]
        by_question = scores_by_question((uuid for uuid, *_ in judged), of_rows)
        scores[metric] = list(by_question.values())
    return Evaluation(
        path=path,
        rows=table.num_rows,
        failed=table["finish_reason"].to_pylist().count(FAILED),
        answers={uuid: tuple(answers) for uuid, _, answers, _ in judged},
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
