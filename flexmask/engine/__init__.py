"""Generation for requests with one model, under mask strategies."""

from flexmask.engine.engine import Engine
from flexmask.engine.generation_run import GenerationRun
from flexmask.engine.run_stats import RunStats

__all__ = ["Engine", "GenerationRun", "RunStats"]
