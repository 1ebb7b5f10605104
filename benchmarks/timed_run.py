"""Times one run of the engine over requests, under a strategy or a fusion chosen by name."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from flexmask import Engine, Fusion, Request, Strategy
from flexmask.engine import RunStats
from flexmask.plugins.registry import make_strategy

FUSIONS = (
    Fusion("none"),
    Fusion("each"),
    Fusion("mean"),
    Fusion("max"),
    Fusion("weighted_mean", "confidence"),
    Fusion("weighted_max", "confidence"),
    Fusion("vote"),
)
"""Fusions that run every segment as a prompt of its own."""


@dataclass(frozen=True)
class Way:
    """A strategy and a fusion; one of them has its default.

    Attributes:
        strategy: The mask strategy: `causal` for fusions of prompts.
        fusion: The fusion: `attention` for strategies.
    """

    strategy: Strategy
    fusion: Fusion

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the way of a strategy, or of one of `FUSIONS`."""
        for fusion in FUSIONS:
            if str(fusion) == name:
                return cls(make_strategy("causal", {}), fusion)
        return cls(make_strategy(name, {}), Fusion())

    def prompts(self, requests: Iterable[Request]) -> list[Request]:
        """Return the prompts that run for requests, each with a row of its own."""
        return [
            prompt
            for request in requests
            for _, prompts in self.fusion.prompts(request)
            for prompt in prompts
        ]


def timed_run(
    engine: Engine,
    requests: Sequence[Request],
    way: Way,
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
) -> tuple[float, RunStats]:
    """Generate for all requests; return seconds until the last generation, and counts."""
    started = time.perf_counter()
    run = engine.generate(
        requests,
        way.strategy,
        fusion=way.fusion,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    for _ in run.batches():
        pass
    return time.perf_counter() - started, run.stats
