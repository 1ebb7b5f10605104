"""How right result files are, and which of two is better, with confidence intervals.

Intervals are percentile bootstraps (Efron, 1979) over questions. Comparisons are paired: the
same questions are drawn for both files, so that what makes a question hard cancels out.
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
        mean: Over the questions.
        low: The interval's lower end.
        high: Its upper end.
    """

    mean: float
    low: float
    high: float


def estimate_mean(scores: Iterable[float]) -> Estimate:
    """The mean of scores and its bootstrap interval; the same for the same scores.

    A resample is the number of times that each distinct score is drawn, which costs the same for
    a million questions as for a thousand.

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
    """The score of each question: the mean of its rows, where there is one for each prompt."""
    of_rows = defaultdict(list)
    for uuid, score in zip(uuids, scores, strict=True):
        of_rows[uuid].append(score)
    return {uuid: fmean(values) for uuid, values in of_rows.items()}


@dataclass(frozen=True)
class Evaluation:
    """What one result file is worth.

    Attributes:
        path: The file.
        rows: Its rows.
        failed: Those that could not be generated; wrong where they have answers.
        answers: By uuid, the accepted answers of the questions that have some.
        scores: By metric, the score of each of those questions in their order.
        estimates: By metric, their mean.
    """

    path: Path
    rows: int
    failed: int
    answers: Mapping[str, tuple[str, ...]]
    scores: Mapping[str, Sequence[float]]
    estimates: Mapping[str, Estimate]


def evaluate(path: Path, metrics: Collection[str], *, language: str = "en") -> Evaluation:
    """Judge the predictions of a result file, or of the journal of an unfinished run.

    Args:
        path: The file.
        metrics: Those of `flexmask.tasks.judge.METRICS` to judge by.
        language: Of lemmas.

    Raises:
        OutputError: If it is not a result file, or has no accepted answers.
    """
    table = read_finished_rows(path)
    columns = (table[name].to_pylist() for name in ("uuid", "prediction", "answers"))
    judged = [row for row in zip(*columns, strict=True) if row[2]]
    if not judged:
        raise OutputError(f"{path}: no row of it has accepted answers to judge by")
    scores = {}
    for metric in metrics:
        judge = Judge(metric=metric, language=language)
        of_rows = [judge.score(prediction, answers) for _, prediction, answers in judged]
        by_question = scores_by_question((uuid for uuid, *_ in judged), of_rows)
        scores[metric] = list(by_question.values())
    return Evaluation(
        path=path,
        rows=table.num_rows,
        failed=table["finish_reason"].to_pylist().count(FAILED),
        answers={uuid: tuple(answers) for uuid, _, answers in judged},
        scores=scores,
        estimates={metric: estimate_mean(values) for metric, values in scores.items()},
    )


@dataclass(frozen=True)
class Comparison:
    """Two result files of the same questions under one metric.

    Attributes:
        metric: Its name.
        first: One file.
        second: The other.
        difference: Mean score of the second less that of the first.
        first_better: Questions on which the first scores higher.
        second_better: Questions on which the second does.
    """

    metric: str
    first: Path
    second: Path
    difference: Estimate
    first_better: int
    second_better: int


def compare(evaluations: Sequence[Evaluation]) -> list[Comparison]:
    """Compare every two result files.

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
    """The evaluation with its questions in the order of another's."""
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
