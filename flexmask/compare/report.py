"""Writes the report of a comparison: the page, and the table as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexmask.compare.comparison_run import ReportFolder
from flexmask.compare.report_page import report_html
from flexmask.compare.table import CellResult
from flexmask.results.result_writer import read_run_config
from flexmask.results.whole_file import replacing
from flexmask.tasks.judge import ChoiceJudge, Judge


def save_report(
    results: Sequence[CellResult], folder: ReportFolder, judge: Judge | ChoiceJudge
) -> None:
    """Write ``report.html`` and ``report.json``.

    Args:
        results: Rows of the table.
        folder: Folder of the report.
        judge: The judge that scored the answers.

    Raises:
        OutputError: If they cannot be written.
    """
    title, facts = _heading(results, folder)
    record = {"facts": facts, "cells": [result.figures() for result in results]}
    with replacing(folder.record) as file:
        file.write(json.dumps(record, indent=2).encode() + b"\n")
    with replacing(folder.page) as file:
        file.write(report_html(title, facts, results, folder, judge).encode())


def _heading(results: Sequence[CellResult], folder: ReportFolder) -> tuple[str, dict[str, str]]:
    """Return a title, and the facts that all cells share, from the first result file."""
    finished = [result.cell for result in results if not result.error]
    if not finished:
        return "Comparison", {}
    config = read_run_config(folder.rows(finished[0]))
    run, where = config.run, config.environment
    libraries = ", ".join(
        f"{name} {where[name]}" for name in ("flexmask", "torch", "transformers")
    )
    facts = {
        "Model": f"{run['model']}, dtype {run['dtype']}",
        "Input": f"{where['input']}, task {run['task']['name']}"
        if run["task"]
        else where["input"],
        **_answering(run),
        "Machine": f"{where['device']}, {libraries}",
    }
    return f"{run['model']} on {Path(where['input']).name}", facts


def _answering(run: Mapping[str, Any]) -> dict[str, str]:
    """Return how answers were generated, or choices compared."""
    if "scores" in run:
        per = {"none": "", "tokens": " per token", "bytes": " per byte"}[run["judge"]["normalize"]]
        return {"Answers": f"the choice with the highest log-probability{per}"}
    sampling = run["sampling"]
    greedy = "the most likely token" if not sampling["temperature"] else f"sampled, {sampling}"
    return {"Generation": f"up to {run['max_new_tokens']} tokens, {greedy}"}
