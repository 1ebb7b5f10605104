"""``flexmask check``: checks strategies against the rules that the engine relies on."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexmask_cli import completion
from flexmask_cli.option_groups import takes_options
from flexmask_cli.options import AsJson, Parameters
from flexmask_cli.render.lines import print_json, print_line, print_passing
from flexmask_cli.strategy_choice import choose_all, stdout_to_stderr

if TYPE_CHECKING:
    from flexmask.check import Outcome
    from flexmask.strategy import Strategy


@dataclass(frozen=True)
class CheckOptions:
    """The strategies to check."""

    strategy: Annotated[
        str,
        typer.Argument(
            metavar="STRATEGY",
            help="Name of a strategy, or path/to/file.py[:name].",
            autocompletion=completion.strategies,
        ),
    ]
    param: Parameters = field(default_factory=list)
    as_json: AsJson = False


@takes_options
def check(*, options: CheckOptions) -> None:
    """Check that a strategy keeps the rules that the engine relies on.

    It checks layouts, mask and compiled attention. The exit status is 1 if a rule is broken.
    """
    chosen = choose_all(options.strategy, dict(options.param))
    outcomes = [_run(item, is_silent=options.as_json) for item in chosen]
    if options.as_json:
        print_json([_fields(*pair) for pair in zip(chosen, outcomes, strict=True)])
    if any(outcome.finding for found in outcomes for outcome in found):
        raise typer.Exit(1)


def _run(strategy: Strategy, is_silent: bool) -> list[Outcome]:
    """Check one strategy; print each rule as it is checked, then the findings."""
    from flexmask.check import RULES, run_rules

    if is_silent:
        with stdout_to_stderr():
            return list(run_rules(strategy))
    print_line(str(strategy))
    outcomes: list[Outcome] = []
    width = max(len(rule.name) for rule in RULES)
    running, results = iter(RULES), run_rules(strategy)
    while len(outcomes) < len(RULES):
        print_passing(f"  {'…':6}  {next(running).name}")
        outcomes.append(next(results))
        rule, status = outcomes[-1].rule, outcomes[-1].status
        if status != "skipped":
            print_line(f"  {status:6}  {rule.name:{width}}  {rule.summary}")
    print_passing("")
    findings = [outcome.finding for outcome in outcomes if outcome.finding]
    for finding in findings:
        print_line(f"\n{finding}")
    print_line(_summary(outcomes))
    return outcomes


def _summary(outcomes: list[Outcome]) -> str:
    counts = Counter(outcome.status for outcome in outcomes)
    if not counts["broken"]:
        return f"all {len(outcomes)} rules kept"
    broken = f"\n{counts['broken']} of {len(outcomes)} rules broken"
    if not counts["skipped"]:
        return broken
    return f"{broken}; {counts['skipped']} were not checked, since they build on it"


def _fields(strategy: Strategy, outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "strategy": strategy.name,
        "parameters": strategy.parameter_values(),
        "rules": [
            {"name": item.rule.name, "asserts": item.rule.summary, "status": item.status}
            for item in outcomes
        ],
        "findings": [asdict(item.finding) for item in outcomes if item.finding],
    }
