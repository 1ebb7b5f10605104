"""A run of the engine: the generations of one `Engine.generate` call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.batch_row import BatchRow
from flexmask.engine.batch_runner import PlacedGroup
from flexmask.engine.executor import Executor
from flexmask.engine.ordered_run import OrderedRun
from flexmask.engine.prompt_group import PromptGroup
from flexmask.engine.prompt_planner import OnRefused, PlannedRequest
from flexmask.engine.run_options import RunOptions
from flexmask.engine.run_stats import RunStats
from flexmask.engine.scheduler import Scheduler
from flexmask.engine.segment_attention import AttentionMeter
from flexmask.errors import RequestError
from flexmask.fusion import majority
from flexmask.generation import Generation
from flexmask.layout import Layout
from flexmask.request import Request
from flexmask.strategy import Strategy


@dataclass(frozen=True)
class _Finished:
    """A generation, and the prompt that it continues: the first one if logits are fused."""

    generation: Generation
    layout: Layout


@dataclass(frozen=True)
class _Refused:
    """A request for which no token can be chosen, and why."""

    request: Request
    error: RequestError


class GenerationRun(OrderedRun[Generation]):
    """The generations of one `Engine.generate` call, in the order of the requests.

    They finish in another order, in which `batches` yields them. Several threads may share one
    run, and several runs one engine.

    Attributes:
        rules: The rules of the model's generation config, as they apply to this run.
    """

    def __init__(
        self,
        executor: Executor,
        strategy: Strategy,
        tokenizer: RequestTokenizer,
        lookaheads: Iterator[Sequence[PlannedRequest]],
        options: RunOptions,
        batch_size: int | None,
        on_refused: OnRefused | None = None,
        meter: AttentionMeter | None = None,
    ) -> None:
        """Plan the first prompts; iterating starts the run.

        Args:
            executor: Executes the batches.
            strategy: The mask strategy.
            tokenizer: Decodes generated tokens, and writes prompts for the record.
            lookaheads: The planned requests, as many at a time as are sorted by length.
            options: The options of the run.
            batch_size: Prompts that run together; None to choose.
            on_refused: Called with each request for which no token can be chosen; None raises.
            meter: Measures where generated tokens attend to; None leaves that out.

        Raises:
            RequestError: If a request cannot be planned, and the planner raises for it.
        """
        self.rules = options.rules
        self._options = options
        self._tokenizer = tokenizer
        self._on_refused = on_refused
        self._meter = meter
        self._request_of: dict[int, Request] = {}
        self._num_generations = self._prompt_tokens = self._generated_tokens = 0
        groups = self._groups(lookaheads)
        self._scheduler = Scheduler(executor, strategy, tokenizer, options, groups, batch_size)
        super().__init__(self._run())

    @property
    def stats(self) -> RunStats:
        """Counts and times of the run so far."""
        return replace(
            self._scheduler.stats,
            generations=self._num_generations,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )

    def steps(self) -> Iterator[list[Generation]]:
        """Yield after each decode step, with the generations that it has finished.

        Raises:
            RequestError: As iterating does.
        """
        self._scheduler.is_stepwise = True
        yield from self.batches()

    @property
    def tokens_in_flight(self) -> Sequence[int]:
        """The tokens so far of the prompt that was started first, of those in flight."""
        return self._scheduler.tokens_in_flight

    def stop(self) -> None:
        """Start no more prompts; iterating yields the generations of those in flight, and ends."""
        self._scheduler.stop()

    def _groups(
        self, lookaheads: Iterator[Sequence[PlannedRequest]]
    ) -> Iterator[Sequence[PromptGroup]]:
        """Pass on the prompts, and note the request of each group."""
        for lookahead in lookaheads:
            self._request_of.update((each.prompts.number, each.request) for each in lookahead)
            yield [each.prompts for each in lookahead]

    def _run(self) -> Iterator[dict[int, Generation | None]]:
        """Yield generations by number as they finish; None for a request that is refused.

        Raises:
            RequestError: The first refusal, if there is no ``on_refused``; after the generations
                of all prompts that were in flight.
        """
        refusal: RequestError | None = None
        for finished in self._scheduler.run():
            outcomes = self._outcomes(finished)
            refused = [one for one in outcomes.values() if isinstance(one, _Refused)]
            if self._on_refused is not None:
                for one in refused:
                    self._on_refused(one.request, one.error)
            elif refused:
                refusal = refusal or refused[0].error
                self._scheduler.stop()
            yield self._measured(outcomes)
        if refusal is not None:
            raise refusal

    def _measured(
        self, outcomes: Mapping[int, _Finished | _Refused]
    ) -> dict[int, Generation | None]:
        """Return generations by number, with what the meter measures; None for a refusal."""
        made = {number: one for number, one in outcomes.items() if isinstance(one, _Finished)}
        generations = {number: one.generation for number, one in made.items()}
        if self._meter is not None:
            stats = self._scheduler.stats
            measured = self._meter.measured(
                ((one.layout, one.generation.token_ids) for one in made.values()),
                stats.batch_size,
                stats.capacity,
            )
            for (number, generation), shares in zip(generations.items(), measured, strict=True):
                generations[number] = replace(generation, segment_attention=shares)
        return {number: generations.get(number) for number in outcomes}

    def _outcomes(self, finished: Sequence[PlacedGroup]) -> Mapping[int, _Finished | _Refused]:
        """The outcome of each prompt group by its number, in ascending order."""
        outcomes = {one.group.number: self._outcome_of(one.group, one.rows) for one in finished}
        made = [one for one in outcomes.values() if isinstance(one, _Finished)]
        generations = [one.generation for one in made]
        self._num_generations += len(generations)
        self._prompt_tokens += sum(one.prompt_tokens for one in generations)
        self._generated_tokens += sum(len(one.token_ids) for one in generations)
        return dict(sorted(outcomes.items()))

    def _outcome_of(self, group: PromptGroup, rows: Sequence[BatchRow]) -> _Finished | _Refused:
        """The generation of a group: the same in all of its rows, or the winner of the vote."""
        request = self._request_of.pop(group.number)
        if fault := next((row.fault for row in rows if row.fault), ""):
            uuid = f" (request {request.uuid!r})" if request.source else ""
            return _Refused(request, RequestError(f"{request.label}{uuid}: {fault}"))
        prompt_tokens = sum(map(len, group.layouts))
        generations = [row.generation(request, prompt_tokens) for row in rows]
        chosen = 0
        if self._options.fusion.is_vote:
            chosen = majority([*map(self._options.answer_of, generations)])
        generation = replace(generations[chosen], prompts=self._prompts_of(request))
        return _Finished(generation, group.layouts[chosen])

    def _prompts_of(self, request: Request) -> tuple[str, ...] | None:
        """The texts that the chat template makes of a request; None without one."""
        if not self._tokenizer.is_chat:
            return None
        prompts = (one for _, some in self._options.fusion.prompts(request) for one in some)
        return tuple(map(self._tokenizer.chat_text, prompts))
