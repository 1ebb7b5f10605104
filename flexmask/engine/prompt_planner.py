"""Plans the prompts of requests: tokens and layouts, some batches ahead in a thread."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, repeat
from threading import current_thread
from typing import NamedTuple

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.choice_prompt import Choices, stored_choices
from flexmask.engine.prompt_group import PromptGroup
from flexmask.errors import FlexMaskWarning, RequestError
from flexmask.fusion import Fusion
from flexmask.layout import Layout, TokenizedRequest
from flexmask.request import Request, RequestKey
from flexmask.strategy import Strategy

OnRefused = Callable[[Request, RequestError], None]

THREAD_NAME = "flexmask-prompts"

TOKENIZED_TOGETHER = 256
"""Requests whose segments are tokenized in one call, which uses every core."""


class PlannedRequest(NamedTuple):
    """A request that is generated for, and its prompts."""

    request: Request
    prompts: PromptGroup


class _Attempt(NamedTuple):
    """The attempt to plan one generation.

    Attributes:
        request_number: Counts the requests, of each of which there may be several generations.
        request: The request that is generated for.
        result: Its prompts, not numbered yet; or the reason for which it cannot be run.
        special_text: Text of a special token in it that was tokenized as plain text.
    """

    request_number: int
    request: Request
    result: PromptGroup | RequestError
    special_text: str | None = None


@dataclass(frozen=True)
class PromptPlanner:
    """Turns requests into prompts; the engine makes one for each run.

    Attributes:
        strategy: The mask strategy, which lays prompts out.
        tokenizer: Turns texts into tokens.
        max_new_tokens: Most tokens that are generated per request.
        context: Positions that the model knows; None for no limit.
        fusion: Says which prompts a request becomes.
        max_rows: Most prompts that run together; None for no limit.
        on_refused: Called with each request that cannot be run; None raises.
        scores_choices: True if the choices of requests are scored, and nothing is generated.
        takes_documents: True if a request of one segment stands for that segment in any prompt.
    """

    strategy: Strategy
    tokenizer: RequestTokenizer
    max_new_tokens: int
    context: int | None
    fusion: Fusion
    max_rows: int | None
    on_refused: OnRefused | None
    scores_choices: bool = False
    takes_documents: bool = False

    def lookaheads(self, requests: Iterable[Request], size: int) -> Iterator[list[PlannedRequest]]:
        """Yield ``size`` generations at a time, planned while the caller runs those before them.

        Raises:
            RequestError: If a request cannot be run and there is no ``on_refused``.
        """
        upcoming = self._attempts(requests, min(size, TOKENIZED_TOGETHER))
        background = ThreadPoolExecutor(1, THREAD_NAME)
        special_texts: dict[int, str] = {}
        try:
            number = 0
            planning = background.submit(list, islice(upcoming, size))
            while attempts := planning.result():
                planning = background.submit(list, islice(upcoming, size))
                lookahead = []
                for attempt in attempts:
                    if attempt.special_text is not None:
                        special_texts.setdefault(attempt.request_number, attempt.special_text)
                    if isinstance(attempt.result, RequestError):
                        if self.on_refused is None:
                            raise attempt.result
                        self.on_refused(attempt.request, attempt.result)
                        continue
                    prompts = replace(attempt.result, number=number)
                    lookahead.append(PlannedRequest(attempt.request, prompts))
                    number += 1
                yield lookahead
            _warn_of(special_texts)
        finally:
            # The garbage collector may close a forgotten run in the background thread itself.
            is_background = current_thread().name.startswith(THREAD_NAME)
            background.shutdown(wait=not is_background)

    def _attempts(self, requests: Iterable[Request], size: int) -> Iterator[_Attempt]:
        expanded = (
            (number, each, prompts)
            for number, request in enumerate(requests)
            for each, prompts in self.fusion.prompts(request)
        )
        last: _Attempt | None = None
        while together := list(islice(expanded, size)):
            self.tokenizer.read_ahead(request for _, request, _ in together)
            for number, request, prompts in together:
                try:
                    last = self._sample(request, prompts, last) or self._plan(
                        number, request, prompts
                    )
                    yield last
                except RequestError as error:
                    yield _Attempt(number, request, error)

    def _sample(
        self, request: Request, prompts: Sequence[Request], last: _Attempt | None
    ) -> _Attempt | None:
        """Plan another sample of the last request; None if ``request`` is none."""
        if not request.sample or last is None:
            return None
        if replace(last.request, sample=request.sample) != request:
            return None
        assert isinstance(last.result, PromptGroup)
        group = replace(last.result, seeds=self._seeds(request, prompts))
        return last._replace(request=request, result=group)

    def _plan(self, number: int, request: Request, prompts: Sequence[Request]) -> _Attempt:
        try:
            self.fusion.check(request)
        except RequestError as error:
            raise RequestError(f"{request.label}: {error}") from None
        num_rows = len(prompts) * self._samples_together
        if self.max_rows is not None and num_rows > self.max_rows:
            of_samples = "" if self._samples_together == 1 else " or samples"
            raise RequestError(
                f"{request.label}: its {num_rows} prompts run together, which takes a batch "
                f"size of {num_rows}, got {self.max_rows}; raise it or take fewer "
                f"segments{of_samples}"
            )
        tokenized = [self._tokenize(prompt) for prompt in prompts]
        choices = [self._choices(prompt) for prompt in prompts] if self.scores_choices else []
        layouts = tuple(map(self._layout, prompts, tokenized, choices or repeat(())))
        special_texts = [each.special_text for each in tokenized if each.special_text]
        group = PromptGroup(
            number=-1,
            layouts=layouts * self._samples_together,
            seeds=self._seeds(request, prompts),
            weights=self.fusion.weights_of(request, len(prompts)) * self._samples_together,
            choices=tuple(choices),
        )
        return _Attempt(number, request, group, next(iter(special_texts), None))

    @property
    def _samples_together(self) -> int:
        return self.fusion.samples if self.fusion.is_vote else 1

    def _seeds(self, request: Request, prompts: Sequence[Request]) -> tuple[str, ...]:
        if self.fusion.is_vote:
            samples = range(self.fusion.samples)
            return tuple(
                _seed(prompt.key._replace(sample=sample))
                for sample in samples
                for prompt in prompts
            )
        drawn_for = [request] * len(prompts) if self.fusion.is_of_logits else prompts
        return tuple(_seed(each.key) for each in drawn_for)

    def _tokenize(self, prompt: Request) -> TokenizedRequest:
        try:
            if self.takes_documents and len(prompt.segments) == 1:
                return self.tokenizer.document(prompt)
            return self.tokenizer(prompt)
        except RequestError as error:
            raise RequestError(f"{prompt.label}: {error}") from None

    def _choices(self, prompt: Request) -> Choices:
        if not prompt.choices:
            raise RequestError(f"{prompt.label}: it has no choices to score")
        try:
            return self.tokenizer.choices(prompt)
        except RequestError as error:
            raise RequestError(f"{prompt.label}: {error}") from None

    def _layout(self, prompt: Request, tokenized: TokenizedRequest, choices: Choices) -> Layout:
        try:
            layout = self.strategy.layout(tokenized)
        except RequestError as error:
            raise RequestError(f"{prompt.label}: {error}") from None
        # A choice's last token is predicted and not computed.
        added = max(map(len, choices)) - 1 if choices else self.max_new_tokens
        added_for = "the longest choice" if choices else "new tokens"
        if excess := beyond_context(layout, added, self.context, added_for):
            raise RequestError(f"{prompt.label}: {excess}; shorten the prompt")
        return layout.with_choices(stored_choices(choices)) if choices else layout


def beyond_context(
    layout: Layout, max_new_tokens: int, context: int | None, added_for: str = "new tokens"
) -> str | None:
    """Say how a prompt and the tokens added to it exceed a context; None if they do not."""
    needed = layout.position_ids[-1] + 1 + max_new_tokens
    if context is None or needed <= context:
        return None
    return (
        f"needs positions up to {needed} ({max_new_tokens} of them for {added_for}), but the "
        f"model's context is {context}"
    )


def _seed(key: RequestKey) -> str:
    seed = key.uuid if key.segment is None else f"{key.uuid}/{key.segment}"
    return f"{seed}/sample {key.sample}" if key.sample else seed


def _warn_of(special_texts: dict[int, str]) -> None:
    """Warn of the requests that hold the text of a special token."""
    if not special_texts:
        return
    count, example = len(special_texts), next(iter(special_texts.values()))
    hold = "1 request holds" if count == 1 else f"{count} requests hold"
    warnings.warn(
        f"{hold} the text of a special token, such as {example!r}, which was tokenized as plain "
        "text; `allow_special_tokens=True` makes it that token",
        FlexMaskWarning,
        stacklevel=2,
    )
