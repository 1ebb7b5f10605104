"""The options of a run: how its tokens are generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter

from flexmask.engine.generation_rules import GenerationRules
from flexmask.fusion import Fusion
from flexmask.generation import Generation
from flexmask.sampling import Sampling


@dataclass(frozen=True)
class RunOptions:
    """The options of one run, as `flexmask.engine.Engine` has checked them.

    Attributes:
        max_new_tokens: Most tokens per generation.
        rules: The rules of the model's generation config.
        sampling: The way tokens are chosen.
        stop: Strings that end a row, those of the generation config included.
        fusion: The way the prompts of a request become one generation.
        answer_of: Returns the answer in a generation, which a vote counts.
        top_logprobs: Most likely tokens whose log-probabilities are kept, beside the chosen one;
            None for no log-probabilities.
    """

    max_new_tokens: int
    rules: GenerationRules
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    fusion: Fusion = Fusion()
    answer_of: Callable[[Generation], str] = attrgetter("prediction")
    top_logprobs: int | None = None

    @property
    def of_steps(self) -> RunOptions:
        """The options that steps depend on: all but the caller's function."""
        return replace(self, answer_of=attrgetter("prediction"))
