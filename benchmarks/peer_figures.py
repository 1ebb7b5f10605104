"""Figures of two engines at the same tasks, beside their floors."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexmask.bench.floors import ModelCost, Rates
from peer_jobs import Outcome
from peer_process import Report
from peer_tasks import PARTS, VLLM_WAYS, Task


@dataclass(frozen=True)
class Figure:
    """A measurement of one engine.

    Attributes:
        way: Strategy or fusion; for vLLM `causal`, or the fusion that runs the same prompts.
        median_s: Median seconds of a decode step, to the first token, or of the data set.
        seconds: Seconds of each run that counts.
        first_s: Seconds of the run before, compilation included.
        floor_s: The floor of these seconds.
        floor_share: The floor as a share of the median.
        prompt_tokens: Prompt tokens of the run, copies included.
        least_tokens: Prompt tokens that must be computed: those that begin alike count once.
        computed_tokens: Prompt tokens that were computed.
    """

    way: str
    median_s: float
    seconds: tuple[float, ...]
    first_s: float
    floor_s: float
    floor_share: float
    prompt_tokens: int
    least_tokens: int
    computed_tokens: int


@dataclass(frozen=True)
class Comparison:
    """Both engines at one task; None for one that did not do it.

    Attributes:
        part: One of `PARTS`.
        rows: Prompts of a case, or questions of the data set.
        context: Slots of a prompt; None for the data set.
        way: What flexmask runs.
        flexmask: Its measurement.
        vllm: vLLM's: the same prompts for `causal`, `none` and `each`; the prompts of `causal`
            for other strategies, and those of `each` for other ways to run the data set.
    """

    part: str
    rows: int
    context: int | None
    way: str
    flexmask: Figure | None
    vllm: Figure | None


@dataclass(frozen=True)
class Floors:
    """Makes figures: compares measured seconds with the floor of a task's work.

    Attributes:
        cost: The cost of the model.
        rates: The rates of the machine.
    """

    cost: ModelCost
    rates: Rates

    def first_token(self, task: Task, outcome: Outcome) -> Figure:
        """Return the figure of the time to the first tokens."""
        floor_s = task.work.prefill_s(self.cost, self.rates)
        return _figure(task, outcome, outcome.seconds, floor_s)

    def dataset(self, task: Task, outcome: Outcome) -> Figure:
        """Return the figure of a run of the data set."""
        floor_s = task.work.prefill_s(self.cost, self.rates)
        floor_s += task.work.decode_s(self.cost, self.rates, task.job.new_tokens - 1)
        return _figure(task, outcome, outcome.seconds, floor_s)

    def decode(self, task: Task, outcome: Outcome, first_token_s: float) -> Figure:
        """Return the figure of a decode step.

        Args:
            task: The generation of many tokens.
            outcome: Its outcome.
            first_token_s: Seconds to the first token of such prompts.
        """
        steps = task.job.new_tokens - 1
        floor_s = task.work.decode_s(self.cost, self.rates, steps) / steps
        seconds = [(total_s - first_token_s) / steps for total_s in outcome.seconds]
        return _figure(task, outcome, seconds, floor_s)


def _figure(task: Task, outcome: Outcome, seconds: Sequence[float], floor_s: float) -> Figure:
    median_s = statistics.median(seconds)
    return Figure(
        way=task.job.way,
        median_s=median_s,
        seconds=tuple(seconds),
        first_s=outcome.first_s,
        floor_s=floor_s,
        floor_share=floor_s / median_s,
        prompt_tokens=outcome.prompt_tokens,
        least_tokens=task.work.tokens,
        computed_tokens=outcome.computed_tokens,
    )


def figures_of(
    tasks: Sequence[Task], outcomes: Mapping[int, Outcome], floors: Floors, parts: Sequence[str]
) -> dict[tuple[str, int, int | None, str], Figure]:
    """Return the figures of one engine by part, rows, context and way."""
    done = [(task, outcomes[task.job.number]) for task in tasks if task.job.number in outcomes]
    figures, first_tokens = {}, {}
    for task, outcome in done:
        where = (task.rows, task.context, task.job.way)
        if task.context is None:
            figures["dataset", *where] = floors.dataset(task, outcome)
        elif task.job.new_tokens == 1:
            first_tokens[where] = floors.first_token(task, outcome)
        else:
            first_s = first_tokens[where].median_s
            figures["decode", *where] = floors.decode(task, outcome, first_s)
    if "first_token" in parts:
        figures |= {("first_token", *where): figure for where, figure in first_tokens.items()}
    return figures


def compare(
    tasks: Sequence[Task],
    reports: Mapping[str, Report],
    cost: ModelCost,
    parts: Sequence[str],
) -> list[Comparison]:
    """Compare the outcomes of engines, part by part.

    Args:
        tasks: The tasks.
        reports: The report of ``flexmask``, and of ``vllm`` once there is one.
        cost: The cost of the model.
        parts: The parts to report.

    Returns:
        Nothing if flexmask failed before it had measured the rates of the machine.
    """
    environment = reports["flexmask"].environment
    if environment is None:
        return []
    floors = Floors(cost, Rates(**environment["rates"]))
    own, peers = (
        figures_of(tasks, reports[name].outcomes, floors, parts) if name in reports else {}
        for name in ("flexmask", "vllm")
    )
    comparisons = []
    for part in PARTS:
        for key in dict.fromkeys(key for key in (*own, *peers) if key[0] == part):
            _, rows, context, way = key
            same = "each" if part == "dataset" else "causal"
            peer = peers.get((part, rows, context, way if way in VLLM_WAYS else same))
            comparisons.append(Comparison(part, rows, context, way, own.get(key), peer))
    return comparisons
