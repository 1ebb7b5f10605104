"""Generation: batches of requests through a model, under a mask strategy."""

from flexmask.engine.engine import Engine
from flexmask.engine.run import GenerationRun, RunStats

__all__ = ["Engine", "GenerationRun", "RunStats"]
