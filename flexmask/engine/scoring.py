"""A scoring run: the scores of the choices of requests, of one `Engine.score` call."""

from __future__ import annotations

import gc
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from threading import RLock

import torch

from flexmask.choice_scores import ChoiceScore, Score, fused_scores
from flexmask.engine.choice_prompt import ChoicePrompt
from flexmask.engine.choice_strategy import ChoiceStrategy
from flexmask.engine.executor import Executor
from flexmask.engine.memory import is_out_of_memory
from flexmask.engine.model_runner import bucketed_capacity
from flexmask.engine.output_head import TokenScores
from flexmask.engine.prefix_cache import common_prefix_length, pays_off
from flexmask.engine.prompt_planner import OnRefused, PlannedRequest
from flexmask.engine.run_stats import RunStats
from flexmask.engine.turns import TURN
from flexmask.errors import FlexMaskWarning, ModelError, RequestError
from flexmask.fusion import Fusion
from flexmask.layout import Layout
from flexmask.request import Request
from flexmask.strategy import Strategy
from flexmask.torch_internals import compiled_graphs


class ChoiceScorer:
    """Scores the choices of prompts, a batch at a time, on an executor that others use too.

    A batch is one prefill of all its prompts with their choices; nothing is decoded. So nothing
    is in flight between two batches.

    Attributes:
        stats: Work and times so far.
    """

    def __init__(self, executor: Executor, strategy: Strategy, batch_size: int | None) -> None:
        """Store what batches need; the executor is prepared by the first one.

        Args:
            executor: Executes the batches.
            strategy: The mask strategy of the prompts.
            batch_size: Prompts that run together; None to choose.
        """
        self._executor = executor
        self._strategy = ChoiceStrategy(strategy)
        self._batch_size = batch_size
        self.stats = RunStats(batch_size=0, capacity=0)

    def settle(self) -> None:
        """Do nothing: no prompt is in flight when another run takes its turn."""

    def scores(
        self, prompts: Sequence[ChoicePrompt]
    ) -> Iterator[list[tuple[int, list[TokenScores]]]]:
        """Score prompts, those of similar length together; yield some at a time.

        Where memory runs out, batches are halved.

        Returns:
            For some of the prompts the index, and the scores of the tokens of each choice.

        Raises:
            ModelError: If memory does not suffice for a single prompt.
        """
        if not prompts:
            return
        # The longest first: if memory does not suffice, that shows at once.
        waiting = deque(sorted(range(len(prompts)), key=lambda n: -len(prompts[n].layout)))
        capacity = bucketed_capacity(1 + len(prompts[waiting[0]].layout))
        capacity = max(capacity, self.stats.capacity)
        chosen = self._batch_size or self._executor.auto_batch_size(len(prompts), capacity)
        rows = max(1, self._executor.runner.rows_that_fit(chosen, capacity))
        # The same shapes for every lookahead, and no size again that did not fit.
        bound = min if self.stats.halvings else max
        rows = bound(rows, self.stats.batch_size or rows)
        layouts = [prompt.layout for prompt in prompts]
        while waiting:
            some = [waiting.popleft() for _ in range(min(rows, len(waiting)))]
            self.stats = replace(self.stats, batch_size=rows, capacity=capacity)
            try:
                scores = self._batch([prompts[index] for index in some], rows, capacity, layouts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                yield list(zip(some, scores, strict=True))
                continue
            # Outside of the handler, because the error holds the tensors of its frames.
            waiting.extendleft(reversed(some))
            rows = self._halved(rows, capacity)

    def _batch(
        self,
        prompts: Sequence[ChoicePrompt],
        rows: int,
        capacity: int,
        upcoming: Sequence[Layout],
    ) -> list[list[TokenScores]]:
        """Score one batch; for each prompt, return the scores of the tokens of each choice.

        Args:
            prompts: The prompts, at most ``rows``.
            rows: Batch rows that the executor is prepared for.
            capacity: Slots per row.
            upcoming: All prompts of the lookahead, in which a common prefix is looked for.
        """
        runner, started = self._executor.runner, time.perf_counter()
        with TURN:
            self._executor.occupancy.admit(self)
            compiled, masks = compiled_graphs(), self._executor.mask_cache.stats
            computed = 0
            if runner.prepare(self._strategy, rows, capacity):
                computed = self._cache_prefix(upcoming, rows)
            plan = runner.plan_choices(dict(enumerate(prompts)))
            predictions = [prompt.predictions() for prompt in prompts]
            slots = [
                row * capacity + slot for row, own in enumerate(predictions) for slot, _ in own
            ]
            tokens = [token for own in predictions for _, token in own]
            scored = runner.score(plan, torch.tensor(slots), torch.tensor(tokens))
            scored = TokenScores(*(tensor.cpu() for tensor in scored))
            later = self._executor.mask_cache.stats
        self.stats = replace(
            self.stats,
            prefills=self.stats.prefills + 1,
            computed_tokens=self.stats.computed_tokens + computed + plan.computed_tokens,
            copied_tokens=self.stats.copied_tokens + plan.copied_tokens,
            cached_spans=self.stats.cached_spans + plan.cached_spans,
            kept_spans=self.stats.kept_spans + len(plan.kept),
            prefill_s=self.stats.prefill_s + time.perf_counter() - started,
            compilations=self.stats.compilations + compiled_graphs() - compiled,
            mask_hits=self.stats.mask_hits + later.hits - masks.hits,
            mask_misses=self.stats.mask_misses + later.misses - masks.misses,
        )
        lengths = [len(choice) for prompt in prompts for choice in prompt.choices]
        of_choices = iter(
            TokenScores(*pair)
            for pair in zip(*(tensor.split(lengths) for tensor in scored), strict=True)
        )
        return [[next(of_choices) for _ in prompt.choices] for prompt in prompts]

    def _cache_prefix(self, layouts: Sequence[Layout], rows: int) -> int:
        """Compute what all prompts begin with once, if that pays; returns its tokens."""
        # The last token of a prompt predicts, so it is computed with each prompt.
        shortest = min(layout.prompt_length for layout in layouts) - 1
        length = min(common_prefix_length(layouts), shortest)
        pays = length > 0 and pays_off(layouts, length, rows)
        return length if pays and self._executor.runner.cache_prefix(layouts[0], length) else 0

    def _halved(self, rows: int, capacity: int) -> int:
        """Free memory, and return a smaller number of rows.

        Raises:
            ModelError: If there is one row only.
        """
        on_gpu = self._executor.runner.device.type == "cuda"
        memory = "GPU memory" if on_gpu else "memory"
        with TURN:
            self._executor.release()
        if rows == 1:
            raise ModelError(
                f"not enough {memory} for one row of {capacity} slots; shorten the prompts"
            )
        gc.collect()
        torch.cuda.empty_cache()
        smaller = max(1, self._executor.runner.rows_that_fit(rows // 2, capacity))
        message = f"out of {memory}: {rows} rows at a time become {smaller}"
        warnings.warn(message, FlexMaskWarning, stacklevel=2)
        halvings = self.stats.halvings + 1
        self.stats = replace(self.stats, batch_size=smaller, halvings=halvings)
        return smaller


@dataclass(frozen=True)
class _Refused:
    """A request whose choices cannot be scored, and why."""

    request: Request
    error: RequestError


class ScoringRun(Iterator[Score]):
    """The scores of one `Engine.score` call, in the order of the requests.

    They finish in another order, in which `batches` yields them.
    """

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
        self._finished = self._run()
        self._waiting: dict[int, Score | None] = {}
        self._next_number = 0
        self._lock = RLock()

    @property
    def stats(self) -> RunStats:
        """Counts and times of the run so far; nothing is generated."""
        return replace(
            self._scorer.stats, generations=self._num_scores, prompt_tokens=self._prompt_tokens
        )

    def __next__(self) -> Score:
        """Return the next score in the order of the requests.

        Raises:
            RequestError: If the logits of a request are NaN, and there is no ``on_refused``.
        """
        with self._lock:
            while True:
                while self._next_number not in self._waiting:
                    self._waiting.update(next(self._finished))
                self._next_number += 1
                score = self._waiting.pop(self._next_number - 1)
                if score is not None:
                    return score

    def batches(self) -> Iterator[list[Score]]:
        """Yield scores as they finish, some at a time.

        Raises:
            RequestError: As iterating does.
        """
        while True:
            with self._lock:
                finished = next(self._finished, None)
            if finished is None:
                return
            yield [score for score in finished.values() if score is not None]

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
        for batch in self._scorer.scores(prompts):
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
