"""A scoring run: the scores of the choices of requests, of one `Engine.score` call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from flexmask.choice_scores import ChoiceScore, Score, fused_scores
from flexmask.engine.choice_prompt import ChoicePrompt
from flexmask.engine.choice_strategy import ChoiceStrategy
from flexmask.engine.executor import Executor
from flexmask.engine.model_runner import ModelRunner
from flexmask.engine.ordered_run import OrderedRun
from flexmask.engine.output_head import TokenScores
from flexmask.engine.prefill_batches import PrefillBatches
from flexmask.engine.prefill_plan import PrefillPlan
from flexmask.engine.prefix_cache import common_prefix_length, pays_off
from flexmask.engine.prompt_planner import OnRefused, PlannedRequest
from flexmask.engine.run_stats import RunStats
from flexmask.errors import RequestError
from flexmask.fusion import Fusion
from flexmask.layout import Layout
from flexmask.strategy import Strategy


class ChoiceScorer(PrefillBatches[ChoicePrompt, "list[TokenScores]"]):
    """Scores the choices of prompts: the scores of the tokens of each choice.

    A batch computes all its prompts with their choices.
    """

    def __init__(self, executor: Executor, strategy: Strategy, batch_size: int | None) -> None:
        """Store what batches need; the executor is prepared by the first one.

        Args:
            executor: Executes the batches.
            strategy: The mask strategy of the prompts.
            batch_size: Prompts that run together; None to choose.
        """
        super().__init__(executor, ChoiceStrategy(strategy), batch_size)

    def _layout_of(self, prompt: ChoicePrompt) -> Layout:
        return prompt.layout

    def _compute(
        self, runner: ModelRunner, prompts: Sequence[ChoicePrompt]
    ) -> tuple[PrefillPlan, list[list[TokenScores]]]:
        plan = runner.plan_choices(dict(enumerate(prompts)))
        capacity = runner.bound.capacity
        predictions = [prompt.predictions() for prompt in prompts]
        slots = [row * capacity + slot for row, own in enumerate(predictions) for slot, _ in own]
        tokens = [token for own in predictions for _, token in own]
        scored = runner.score(plan, torch.tensor(slots), torch.tensor(tokens))
        with runner.ranks.waiting():
            on_host = TokenScores(*(tensor.cpu() for tensor in scored))
        lengths = [len(choice) for prompt in prompts for choice in prompt.choices]
        of_choices = iter(
            TokenScores(*pair)
            for pair in zip(*(tensor.split(lengths) for tensor in on_host), strict=True)
        )
        return plan, [[next(of_choices) for _ in prompt.choices] for prompt in prompts]

    def _share(
        self, runner: ModelRunner, upcoming: Sequence[Layout], rows: int
    ) -> PrefillPlan | None:
        """Compute what all prompts begin with once, if that pays."""
        # The last token of a prompt predicts, so it is computed with each prompt.
        shortest = min(layout.prompt_length for layout in upcoming) - 1
        length = min(common_prefix_length(upcoming), shortest)
        pays = length > 0 and pays_off(upcoming, length, rows)
        return runner.cache_prefix(upcoming[0], length) if pays else None


class ScoringRun(OrderedRun[Score]):
    """The scores of one `Engine.score` call, in the order of the requests."""

    def __init__(
        self,
        scorer: ChoiceScorer,
        lookaheads: Iterator[Sequence[PlannedRequest]],
        fusion: Fusion,
        on_refused: OnRefused | None = None,
    ) -> None:
        """Store what the run needs; iterating starts it.

        Args:
            scorer: Scores the prompts.
            lookaheads: The planned requests, as many at a time as are sorted by length.
            fusion: The way the scores of several prompts become one.
            on_refused: Called with each request that has no scores; None raises.
        """
        self._scorer = scorer
        self._lookaheads = lookaheads
        self._fusion = fusion
        self._on_refused = on_refused
        self._is_stopped = False
        self._num_scores = self._prompt_tokens = 0
        super().__init__(self._run())

    @property
    def stats(self) -> RunStats:
        """Counts and times of the run so far; nothing is generated."""
        return replace(
            self._scorer.stats, generations=self._num_scores, prompt_tokens=self._prompt_tokens
        )

    def stop(self) -> None:
        """Start no more prompts."""
        self._is_stopped = True

    def _run(self) -> Iterator[dict[int, Score | None]]:
        """Yield scores by number as they finish; None for a request that is refused."""
        for lookahead in self._lookaheads:
            if self._is_stopped:
                return
            yield from self._outcomes(lookahead)

    def _outcomes(self, lookahead: Sequence[PlannedRequest]) -> Iterator[dict[int, Score | None]]:
        places = [
            (planned, index) for planned in lookahead for index in range(len(planned[1].layouts))
        ]
        prompts = [
            ChoicePrompt(planned.prompts.layouts[index], planned.prompts.choices[index])
            for planned, index in places
        ]
        missing = {planned.prompts.number: len(planned.prompts.layouts) for planned in lookahead}
        found: dict[tuple[int, int], list[TokenScores]] = {}
        for batch in self._scorer.results(prompts):
            outcomes: dict[int, Score | None] = {}
            for place, scores in batch:
                planned, index = places[place]
                number = planned.prompts.number
                found[number, index] = scores
                missing[number] -= 1
                if not missing[number]:
                    of_prompts = [found.pop((number, n)) for n in range(len(planned[1].layouts))]
                    outcomes[number] = self._outcome(planned, of_prompts)
            yield outcomes
            if self._is_stopped:
                return

    def _outcome(
        self, planned: PlannedRequest, of_prompts: Sequence[Sequence[TokenScores]]
    ) -> Score | None:
        request, group = planned
        if any(bool(one.logprobs.isnan().any()) for scores in of_prompts for one in scores):
            error = RequestError(
                f"{request.label}: the model's logits hold NaN or infinity; check its weights, "
                "and load it in bfloat16 or float32 if it runs in float16"
            )
            if self._on_refused is None:
                raise error
            self._on_refused(request, error)
            return None
        by_prompt = [
            tuple(
                ChoiceScore(text, tokens, tuple(one.logprobs.tolist()), bool(one.is_greedy.all()))
                for text, tokens, one in zip(request.choices, choices, scores, strict=True)
            )
            for choices, scores in zip(group.choices, of_prompts, strict=True)
        ]
        fused = by_prompt[0] if len(by_prompt) == 1 else fused_scores(by_prompt, self._fusion.name)
        prompt_tokens = sum(layout.prompt_length for layout in group.layouts)
        self._num_scores += 1
        self._prompt_tokens += prompt_tokens
        return Score(request, fused, prompt_tokens)
