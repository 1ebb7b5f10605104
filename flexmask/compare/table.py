"""The table of a comparison: score, difference from the first cell, and cost of each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from flexmask.compare.cell import Cell
from flexmask.compare.comparison_run import ReportFolder
from flexmask.compare.measurement import Measurement
from flexmask.results.evaluation import (
    Comparison,
    Estimate,
    Evaluation,
    compare,
    evaluate,
    scores_by_question,
)
from flexmask.results.result_writer import read_finished_rows
from flexmask.results.schema import answer_logprob
from flexmask.tasks.judge import ChoiceJudge, Judge

COSTS = (
    *("tokens_per_s", "ms_per_question", "first_token_ms"),
    *("prompt_tokens", "computed_tokens", "peak_bytes"),
)
"""Figures of a cell that measure its cost."""


@dataclass(frozen=True)
class CellResult:
    """A row of the table.

    Attributes:
        cell: The cell.
        error: Reason of failure; empty if it did not fail.
        rows: Number of rows of its result file.
        questions: Number of questions; less than ``rows`` if each prompt has a row.
        evaluation: Scores of its answers; None if it failed or no request has accepted answers.
        against_first: Comparison of the first cell with this one; None for the first.
        mean_logprob: Mean log-probability of its answers, generated or chosen; None if the cell
            did not keep them.
        measurement: Its cost; None if nothing was generated.
    """

    cell: Cell
    error: str
    rows: int
    questions: int
    evaluation: Evaluation | None
    against_first: Comparison | None
    mean_logprob: float | None
    measurement: Measurement | None

    def figures(self) -> dict[str, Any]:
        """Return all values as JSON values; costs are per question."""
        way, against, evaluation = self.cell.way, self.against_first, self.evaluation
        return {
            "name": self.cell.name,
            "num_segments": way.num_segments,
            "strategy": way.contender.reference,
            "parameters": way.contender.strategy.parameter_values(),
            "fusion": way.fusion.record(),
            "same": list(self.cell.same),
            "file": f"{self.cell.stem}.feather",
            "error": self.error or None,
            "rows": self.rows,
            "questions": self.questions,
            "failed_rows": evaluation and evaluation.failed,
            "score": self.score and asdict(self.score),
            "difference": against and asdict(against.difference),
            "first_better": against and against.first_better,
            "better_than_first": against and against.second_better,
            "mean_logprob": self.mean_logprob,
            **self._costs(),
        }

    def _costs(self) -> dict[str, Any]:
        measured = self.measurement
        if measured is None:
            return dict.fromkeys((*COSTS, "measured"))
        per_row = self.rows / self.questions if self.questions else 1.0
        ms_per_row = measured.ms_per_row
        return {
            "tokens_per_s": measured.tokens_per_s,
            "ms_per_question": None if ms_per_row is None else ms_per_row * per_row,
            "first_token_ms": measured.first_token_ms,
            "prompt_tokens": measured.prompt_tokens / measured.rows * per_row,
            "computed_tokens": measured.computed_tokens / measured.rows * per_row,
            "peak_bytes": measured.peak_bytes or None,
            "measured": {n: v for n, v in asdict(measured).items() if n != "first_token_s"},
        }

    @property
    def score(self) -> Estimate | None:
        """Mean score of its answers; None without an evaluation."""
        if self.evaluation is None:
            return None
        (estimate,) = self.evaluation.estimates.values()
        return estimate


def tabulate(
    cells: Sequence[Cell],
    folder: ReportFolder,
    judge: Judge | ChoiceJudge,
    errors: Mapping[Cell, str],
) -> list[CellResult]:
    """Score the result files of cells and compare each with the first.

    Args:
        cells: The cells that were run, including failed ones.
        folder: Folder of their files.
        judge: Scores the answers.
        errors: Reasons of the cells that failed.
    """
    evaluations = {cell: _evaluate(cell, folder, judge) for cell in cells if cell not in errors}
    first = evaluations.get(cells[0])
    results = []
    for cell in cells:
        evaluation, against = evaluations.get(cell), None
        if first is not None and evaluation is not None and evaluation is not first:
            (against,) = compare([first, evaluation])
        rows = [] if cell in errors else read_finished_rows(folder.rows(cell)).to_pylist()
        results.append(
            CellResult(
                cell=cell,
                error=errors.get(cell, ""),
                rows=len(rows),
                questions=len({row["uuid"] for row in rows}),
                evaluation=evaluation,
                against_first=against,
                mean_logprob=_mean_logprob(rows),
                measurement=Measurement.read(folder.times(cell)),
            )
        )
    return results


def _mean_logprob(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean log-probability of the answers of rows, with equal weight of questions."""
    logprobs = [(row["uuid"], answer_logprob(row)) for row in rows]
    kept = [(uuid, logprob) for uuid, logprob in logprobs if logprob is not None]
    return fmean(scores_by_question(*zip(*kept, strict=True)).values()) if kept else None


def _evaluate(cell: Cell, folder: ReportFolder, judge: Judge | ChoiceJudge) -> Evaluation | None:
    """Score a cell's rows; return None if none has accepted answers."""
    path = folder.rows(cell)
    verdicts = read_finished_rows(path)["correct"]
    if verdicts.null_count == len(verdicts):
        return None
    return evaluate(path, [judge.metric], language=judge.language)
