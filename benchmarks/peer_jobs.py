"""Jobs that processes of different engines run, and their outcomes, in files of JSON lines.

Standard library only, because the environment of a peer may hold nothing of flexmask.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """Generations to time.

    Attributes:
        number: Identifies the job in its `Outcome`.
        way: Strategy or fusion that flexmask runs; vLLM runs prompts as they are.
        new_tokens: Tokens to generate for every prompt.
        prompts: The prompts of each run: fields of a request for flexmask, token ids for vLLM.
        times: Times that these runs are made one after another; the very first run warms up.
        scores_prompts: Also compute the log-probability of every prompt token.
    """

    number: int
    way: str
    new_tokens: int
    prompts: tuple[tuple[Any, ...], ...]
    times: int = 1
    scores_prompts: bool = False

    @property
    def runs(self) -> Iterator[tuple[Any, ...]]:
        """The prompts of every run."""
        return chain.from_iterable(repeat(self.prompts, self.times))


@dataclass(frozen=True)
class Outcome:
    """The times of a job.

    Attributes:
        number: The job's number.
        first_s: Seconds of the first run, compilation included.
        seconds: Seconds of each run after the first.
        prompt_tokens: Prompt tokens of the last run, copies included.
        computed_tokens: Those that were computed; the others came out of a prefix cache.
        counts: What else the engine counted in the last run.
    """

    number: int
    first_s: float
    seconds: tuple[float, ...]
    prompt_tokens: int
    computed_tokens: int
    counts: dict[str, Any] = field(default_factory=dict)


def write_jobs(path: Path, jobs: Iterable[Job]) -> None:
    """Write jobs, one a line."""
    path.write_text("".join(json.dumps(vars(job)) + "\n" for job in jobs))


def read_jobs(path: Path) -> list[Job]:
    """Read the jobs that `write_jobs` wrote."""
    return [Job(**json.loads(line)) for line in path.read_text().splitlines()]


class OutcomeFile:
    """The environment of a process, then its outcomes, each written at once."""

    def __init__(self, path: Path) -> None:
        """Write and read ``path``."""
        self._path = path

    def write(self, line: dict[str, Any] | Outcome) -> None:
        """Add the environment, first, or an outcome."""
        value = asdict(line) if isinstance(line, Outcome) else line
        with self._path.open("a") as file:
            file.write(json.dumps(value) + "\n")

    def read(self) -> tuple[dict[str, Any] | None, list[Outcome]]:
        """Return the environment, None if the process did not get so far, and the outcomes."""
        # A process that was killed may have left half a line.
        text = self._path.read_text() if self._path.exists() else ""
        environment, *outcomes = [
            json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")
        ] or [None]
        return environment, [Outcome(**outcome) for outcome in outcomes]
