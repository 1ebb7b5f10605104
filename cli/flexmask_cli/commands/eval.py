"""``flexmask eval``: accuracy of result files, and comparisons of every two of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexmask_cli.option_groups import takes_options
from flexmask_cli.option_kinds import flag, paths_argument, refuse_devices, text
from flexmask_cli.options import JUDGE_FORM, AsJson
from flexmask_cli.render.lines import print_json, print_line, warnings_as_lines
from flexmask_cli.render.table import percent, print_table

if TYPE_CHECKING:
    from flexmask.results.evaluation import Comparison, Evaluation


@dataclass(frozen=True)
class EvalOptions:
    """The files to judge, and the metrics."""

    files: Annotated[
        list[Path],
        paths_argument(metavar="FILE", help="Result files of the same questions."),
    ]
    lemma: Annotated[
        bool, flag("--lemma", help="Also compare lemmas, word by word (flexmask[lemma]).")
    ] = False
    language: Annotated[
        str, text("--language", metavar="CODE", help="Language of the lemmas, by ISO 639.")
    ] = "en"
    judge: Annotated[
        list[str],
        typer.Option(
            metavar=JUDGE_FORM,
            help="Score by this instead of exact and f1. Repeatable.",
        ),
    ] = field(default_factory=list)
    cut: Annotated[
        str | None,
        text(
            "--cut",
            metavar="first line|all",
            help="Judge this part of each generation. Default: the predictions of the file.",
        ),
    ] = None
    as_json: AsJson = False

    def __post_init__(self) -> None:
        """Check the judges; a Python file is not run.

        Raises:
            OptionError: If there is no such judge or cut.
        """
        from flexmask.tasks.judge import CUTS, Judge

        for metric in self.metrics:
            Judge(self.cut or CUTS[0], metric, self.language)

    @property
    def metrics(self) -> list[str]:
        """The metrics to score by."""
        return [*(self.judge or ["exact", "f1"]), *(["lemma"] if self.lemma else [])]


@takes_options
def evaluate(*, options: EvalOptions) -> None:
    """Judge result files, and compare every two of them question by question."""
    from flexmask.results.evaluation import compare
    from flexmask.results.evaluation import evaluate as evaluate_file

    for path in options.files:
        refuse_devices(path)
    with warnings_as_lines():
        evaluations = [
            evaluate_file(path, options.metrics, language=options.language, cut=options.cut)
            for path in options.files
        ]
    comparisons = compare(evaluations)
    if options.as_json:
        print_json(
            {
                "files": [_fields(evaluation) for evaluation in evaluations],
                "comparisons": [_comparison_fields(item) for item in comparisons],
            }
        )
        return
    print_table([_row(evaluation) for evaluation in evaluations], wrapped=["file"])
    if comparisons:
        print_line("")
        rows = [_comparison_row(item) for item in comparisons]
        print_table(rows, wrapped=["first", "second"])


def _fields(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "file": str(evaluation.path),
        "rows": evaluation.rows,
        "failed": evaluation.failed,
        "judged": len(evaluation.answers),
        "metrics": {name: asdict(value) for name, value in evaluation.estimates.items()},
    }


def _row(evaluation: Evaluation) -> dict[str, str]:
    return {
        "file": str(evaluation.path),
        "rows": str(evaluation.rows),
        "failed": str(evaluation.failed),
        "judged": str(len(evaluation.answers)),
        **{name: percent(value) for name, value in evaluation.estimates.items()},
    }


def _comparison_fields(item: Comparison) -> dict[str, Any]:
    return asdict(item) | {"first": str(item.first), "second": str(item.second)}


def _comparison_row(item: Comparison) -> dict[str, str]:
    return {
        "first": str(item.first),
        "second": str(item.second),
        "metric": item.metric,
        "second - first": percent(item.difference, sign="+"),
        "first better": str(item.first_better),
        "second better": str(item.second_better),
    }
