"""Measures flexmask beside vLLM: decoding, first tokens, and a data set, each with its floor.

Both run one model shape with random weights on one machine, one after the other, each in a
process of its own with a time limit. vLLM may live in another environment (``--vllm-site``,
``--vllm-python``); if it does not start, the record and the table say so.

flexmask is given texts, which it tokenizes within the measured time; vLLM is given the token ids
of the same prompts. Prompts of a case are new in every run. The time of a decode step is the
difference between generating many tokens and one. A data set runs twice and the second run counts;
vLLM's prefix cache is emptied before it, and flexmask keeps nothing between runs.
``flexmask.bench.floors`` and ``prompt_work.py`` say what a floor is. The data set's rows are all
in one batch there.

Examples:
    python benchmarks/vllm_peer.py --vllm-site /opt/vllm --requests questions.jsonl
    python benchmarks/vllm_peer.py --shape tiny --device cpu --cases 1x64 --steps 4 --questions 8
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import vllm_process
from flexmask import read_requests
from flexmask.bench.floors import ModelCost
from peer_figures import Comparison, Figure, compare
from peer_process import Report, run_jobs
from peer_tasks import PARTS, STRATEGIES, WAYS, Settings, Task, Tasks
from random_model import DTYPES, SHAPES, random_model

HERE = Path(__file__).parent


SHOWN: dict[str, Callable[[float, int], str]] = {
    "decode": lambda seconds, rows: f"{rows / seconds:,.0f} tokens/s",
    "first_token": lambda seconds, rows: f"{1e3 * seconds:.1f} ms",
    "dataset": lambda seconds, rows: f"{seconds:.2f} s",
}
"""Form of a time in each part."""


def table_row(comparison: Comparison) -> str:
    """Return a line of the table."""

    def shown(figure: Figure | None) -> str:
        if figure is None:
            return f"{'–':>34}"
        form = SHOWN[comparison.part]
        spread = max(figure.seconds) - min(figure.seconds)
        return (
            f"{form(figure.median_s, comparison.rows):>16} "
            f"±{spread / 2 / figure.median_s:5.1%} {figure.floor_share:10.0%}"
        )

    own, peer = comparison.flexmask, comparison.vllm
    size = f"{comparison.rows}" + (f"x{comparison.context}" if comparison.context else "")
    speed = f"{peer.median_s / own.median_s:6.2f}" if own and peer else f"{'–':>6}"
    return (
        f"{comparison.part:12}{size:9}{comparison.way:20}{shown(own)}  "
        f"{peer.way if peer else '–':8}{shown(peer)}  {speed}"
    )


def print_table(comparisons: Sequence[Comparison], reports: Mapping[str, Report]) -> None:
    """Print a line for each comparison, and the reason why an engine did not run everything."""
    print(
        f"{'':41}{'flexmask':>16} {'spread':>6} {'of floor':>10}  {'vLLM':8}"
        f"{'':>16} {'spread':>6} {'of floor':>10}  {'faster':>6}"
    )
    for comparison in comparisons:
        print(table_row(comparison))
    for name, report in reports.items():
        print(f"{name}: {report.failure or 'complete'} ({report.total_s:.0f} s)")


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--device", choices=tuple(DTYPES), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cases", nargs="+", default=("1x1024", "8x1024", "64x1024", "1x16384"))
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=("causal", "ensemble_isolation")
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=Path, help="questions, as myriadlama.py writes them")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--time-limit", type=float, default=280, help="seconds for each engine")
    parser.add_argument("--vllm-site", type=Path, help="folder with vLLM's packages")
    parser.add_argument("--vllm-python", default=sys.executable, help="a Python that has vLLM")
    parser.add_argument("--record", type=Path, help="file that receives the results so far")
    return parser.parse_args()


def run_flexmask(settings: Settings, tasks: Sequence[Task], folder: Path) -> Report:
    """Run the tasks with flexmask."""
    command = [sys.executable, str(HERE / "run_flexmask.py"), settings.shape, settings.device]
    jobs = [task.job for task in tasks]
    return run_jobs(command, jobs, folder, settings.time_limit_s, os.environ)


def run_vllm(
    settings: Settings, tasks: Sequence[Task], folder: Path, python: str, site: Path | None
) -> Report:
    """Run those tasks that vLLM can do.

    Args:
        settings: What is measured.
        tasks: The tasks.
        folder: An empty folder.
        python: The Python to run.
        site: The only folder on ``PYTHONPATH``; None to leave it as it is.
    """
    jobs = [task.vllm_job for task in tasks if task.vllm_job is not None]
    return vllm_process.run_vllm(settings.shape, jobs, folder, settings.time_limit_s, python, site)


def record_line(
    settings: Settings, reports: Mapping[str, Report], comparisons: Sequence[Comparison]
) -> str:
    """Return the record as a line of JSON."""
    record = {
        "settings": asdict(settings),
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "engines": {
            name: {
                "environment": report.environment,
                "failure": report.failure,
                "total_s": report.total_s,
            }
            for name, report in reports.items()
        },
    }
    return json.dumps(record)


def main() -> None:
    """Run flexmask, then vLLM; print the record, unless it goes to a file, and a table."""
    arguments = parse()
    requests = None
    if arguments.requests:
        requests = read_requests(str(arguments.requests))[: arguments.questions]
    settings = Settings(
        shape=arguments.shape,
        device=arguments.device,
        parts=tuple(arguments.parts),
        cases=tuple(arguments.cases),
        strategies=tuple(arguments.strategies),
        ways=tuple(arguments.ways),
        steps=arguments.steps,
        repeats=arguments.repeats,
        requests=arguments.requests.name if arguments.requests else None,
        questions=len(requests) if requests else arguments.questions,
        max_new_tokens=arguments.max_new_tokens,
        time_limit_s=arguments.time_limit,
    )
    cost = ModelCost.of(random_model(settings.shape, "meta", DTYPES[settings.device]))
    tasks = list(Tasks(settings, requests).all())
    engines: dict[str, Callable[[Path], Report]] = {
        "flexmask": partial(run_flexmask, settings, tasks),
        "vllm": partial(
            run_vllm, settings, tasks, python=arguments.vllm_python, site=arguments.vllm_site
        ),
    }
    reports: dict[str, Report] = {}
    for name, run in engines.items():
        with tempfile.TemporaryDirectory() as folder:
            reports[name] = run(Path(folder))
        comparisons = compare(tasks, reports, cost, settings.parts)
        line = record_line(settings, reports, comparisons)
        if arguments.record is not None:
            arguments.record.write_text(line + "\n")
    if arguments.record is None:
        print(line)
    print_table(comparisons, reports)


if __name__ == "__main__":
    main()
