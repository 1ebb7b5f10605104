"""From requests to prompts, some at a time, and the next ones while the last are run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import current_thread
from typing import NamedTuple

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.errors import FlexMaskWarning, RequestError
from flexmask.fusion import Fusion
from flexmask.layout import Layout, TokenizedRequest
from flexmask.request import Request
from flexmask.strategy import Strategy

OnRefused = Callable[[Request, RequestError], None]

THREAD_NAME = "flexmask-prompts"

TOKENIZED_TOGETHER = 256
"""Requests whose segments are tokenized in one call, which uses every core."""


@dataclass(frozen=True)
class Job:
    """One generation to make, of one prompt or of several that run together.

    Attributes:
        number: Counts the generations of a run, in request order.
        request: What to generate for.
        layouts: The tokens of each prompt.
        seeds: What of each prompt seeds sampling; those with the same one draw alike.
    """

    number: int
    request: Request
    layouts: tuple[Layout, ...]
    seeds: tuple[str, ...]

    @property
    def longest(self) -> int:
        """Slots of its longest prompt."""
        return max(map(len, self.layouts))


class _Planned(NamedTuple):
    """What became of a request, or of one of its segments.

    Attributes:
        number: Counts the requests, of which some become several generations.
        request: What to generate for.
        outcome: Its prompts with what seeds each, or why there are none.
        special_text: Text of a special token in it that was tokenized as plain text.
    """

    number: int
    request: Request
    outcome: tuple[tuple[Layout, ...], tuple[str, ...]] | RequestError
    special_text: str | None = None


@dataclass(frozen=True)
class PromptPlanner:
    """Turns requests into prompts, as many for each as its fusion wants.

    Attributes:
        strategy: Who sees whom.
        tokenizer: Makes tokens of texts.
        max_new_tokens: Most tokens that are generated per request.
        context: Positions that the model knows; None for no limit.
        fusion: What becomes a prompt.
        max_rows: Most prompts that run together; None for as many as it takes.
        on_refused: Called with each request that cannot be run; None raises.
    """

    strategy: Strategy
    tokenizer: RequestTokenizer
    max_new_tokens: int
    context: int | None
    fusion: Fusion
    max_rows: int | None
    on_refused: OnRefused | None

    def windows(self, requests: Iterable[Request], size: int) -> Iterator[list[Job]]:
        """Plan ``size`` jobs at a time, the next ones in the background.

        Raises:
            RequestError: If a request cannot be run and there is no ``on_refused``.
        """
        upcoming = self._planned(requests, min(size, TOKENIZED_TOGETHER))
        background = ThreadPoolExecutor(1, THREAD_NAME)
        special_texts: dict[int, str] = {}
        try:
            number = 0
            window = background.submit(list, islice(upcoming, size))
            while outcomes := window.result():
                window = background.submit(list, islice(upcoming, size))
                jobs = []
                for planned in outcomes:
                    if planned.special_text is not None:
                        special_texts.setdefault(planned.number, planned.special_text)
                    if isinstance(planned.outcome, RequestError):
                        if self.on_refused is None:
                            raise planned.outcome
                        self.on_refused(planned.request, planned.outcome)
                        continue
                    jobs.append(Job(number, planned.request, *planned.outcome))
                    number += 1
                yield jobs
            _warn_of(special_texts)
        finally:
            # The garbage collector may close a forgotten run in the background thread itself.
            is_background = current_thread().name.startswith(THREAD_NAME)
            background.shutdown(wait=not is_background)

    def _planned(self, requests: Iterable[Request], size: int) -> Iterator[_Planned]:
        outputs = (
            (number, output)
            for number, request in enumerate(requests)
            for output in self.fusion.outputs(request)
        )
        while together := list(islice(outputs, size)):
            self.tokenizer.read_ahead(output for _, output in together)
            for number, output in together:
                try:
                    yield self._plan(number, output)
                except RequestError as error:
                    yield _Planned(number, output, error)

    def _plan(self, number: int, output: Request) -> _Planned:
        try:
            self.fusion.check(output)
        except RequestError as error:
            raise RequestError(f"{output.label}: {error}") from None
        prompts = self.fusion.prompts(output)
        if self.max_rows is not None and len(prompts) > self.max_rows:
            raise RequestError(
                f"{output.label}: its {len(prompts)} prompts run together, which takes a batch "
                f"size of {len(prompts)}, got {self.max_rows}; raise it or take fewer segments"
            )
        tokenized = [self._tokenize(prompt) for prompt in prompts]
        layouts = tuple(map(self._layout, prompts, tokenized))
        drawn_for = [output] * len(prompts) if self.fusion.is_of_logits else prompts
        special_texts = [each.special_text for each in tokenized if each.special_text]
        seeds = tuple(map(_seed, drawn_for))
        return _Planned(number, output, (layouts, seeds), next(iter(special_texts), None))

    def _tokenize(self, prompt: Request) -> TokenizedRequest:
        try:
            return self.tokenizer(prompt)
        except RequestError as error:
            raise RequestError(f"{prompt.label}: {error}") from None

    def _layout(self, request: Request, tokenized: TokenizedRequest) -> Layout:
        try:
            layout = self.strategy.layout(tokenized)
        except RequestError as error:
            raise RequestError(f"{request.label}: {error}") from None
        needed = layout.position_ids[-1] + 1 + self.max_new_tokens
        if self.context is not None and needed > self.context:
            raise RequestError(
                f"{request.label}: needs positions up to {needed} ({self.max_new_tokens} of them "
                f"for new tokens), but the model's context is {self.context}; shorten the prompt"
            )
        return layout


def _seed(request: Request) -> str:
    return request.uuid if request.segment is None else f"{request.uuid}/{request.segment}"


def _warn_of(special_texts: dict[int, str]) -> None:
    """Say how many requests hold the text of a special token."""
    if not special_texts:
        return
    count, example = len(special_texts), next(iter(special_texts.values()))
    hold = "1 request holds" if count == 1 else f"{count} requests hold"
    warnings.warn(
        f"{hold} the text of a special token, such as {example!r}, which was tokenized as plain "
        "text; --allow-special-tokens (allow_special_tokens=True) makes it that token",
        FlexMaskWarning,
        stacklevel=2,
    )
