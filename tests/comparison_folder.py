"""A comparison without a model: result files with made-up answers, and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flexmask.compare.cell import ATTENTION, Cell, Contender, Way
from flexmask.compare.comparison_run import ReportFolder
from flexmask.compare.measurement import Measurement
from flexmask.compare.report import save_report
from flexmask.compare.table import CellResult, tabulate
from flexmask.fusion import Fusion
from flexmask.generation import Generation
from flexmask.plugins.registry import make_strategy
from flexmask.request import Request
from flexmask.results.result_writer import ResultWriter
from flexmask.results.run_config import RunConfig
from flexmask.tasks.judge import Judge

CONFIG = RunConfig(
    run={
        **{"model": "demo", "dtype": "auto", "task": None, "max_new_tokens": 4},
        "sampling": {"temperature": 0.0},
    },
    environment={
        **{"input": "questions.jsonl", "device": "cpu", "flexmask": "0"},
        **{"torch": "2", "transformers": "5"},
    },
)


def made_up_cell(name: str, num_segments: int, same: Sequence[str] = ()) -> Cell:
    contender = Contender("causal", make_strategy("causal", {}))
    fusion = ATTENTION if name == "causal" else Fusion("mean")
    return Cell(Way(contender, fusion, num_segments), name, tuple(same))


def write_cell(
    folder: ReportFolder, cell: Cell, requests: Sequence[Request], answers: Sequence[str]
) -> None:
    """Write the rows and the times of a cell; it took as many seconds as it has segments."""
    count = cell.way.num_segments or 0
    cut = [request.with_segments(count) for request in requests]
    with ResultWriter.open(folder.rows(cell), config=CONFIG, requests=cut) as writer:
        writer.write(
            Generation(request, answer, (1,), "eos", 10 * count)
            for request, answer in zip(cut, answers, strict=True)
        )
    rows = len(requests)
    Measurement(
        {"device": "cpu"}, 8, rows, 10 * count * rows, 5 * count * rows, rows,
        timed_rows=rows, timed_tokens=rows, timed_s=float(count), first_token_s=(0.5,),
    ).write(folder.times(cell))  # fmt: skip


def write_comparison(
    path: Path, cells: Mapping[Cell, Sequence[str]], requests: Sequence[Request], failed: Cell
) -> list[CellResult]:
    """Write a report of cells with these answers, and of one that failed."""
    folder = ReportFolder(path)
    for cell, answers in cells.items():
        write_cell(folder, cell, requests, answers)
    results = tabulate([*cells, failed], folder, Judge(), {failed: "it <b>broke</b>"})
    save_report(results, folder, Judge())
    return results
