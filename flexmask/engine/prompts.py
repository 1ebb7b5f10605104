"""From requests to prompts, some at a time, and the next ones while the last are run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from threading import current_thread

from flexmask.errors import RequestError
from flexmask.fusion import Fusion
from flexmask.layout import Layout
from flexmask.request import Request
from flexmask.strategy import Strategy
from flexmask.tokenization import RequestTokenizer

OnRefused = Callable[[Request, RequestError], None]
_Prompts = tuple[tuple[Layout, ...], tuple[str, ...]]


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
        planned = self._planned(requests, min(size, TOKENIZED_TOGETHER))
        background = ThreadPoolExecutor(1, THREAD_NAME)
        try:
            number = 0
            window = background.submit(list, islice(planned, size))
            while outcomes := window.result():
                window = background.submit(list, islice(planned, size))
                jobs = []
                for outcome in outcomes:
                    if isinstance(outcome, RequestError):
                        raise outcome
                    request, prompts = outcome
                    if isinstance(prompts, RequestError):
                        if self.on_refused is not None:
                            self.on_refused(request, prompts)
                        continue
                    jobs.append(Job(number, request, *prompts))
                    number += 1
                yield jobs
        finally:
            # The garbage collector may close a forgotten run in the background thread itself.
            is_background = current_thread().name.startswith(THREAD_NAME)
            background.shutdown(wait=not is_background)

    def _planned(
        self, requests: Iterable[Request], size: int
    ) -> Iterator[tuple[Request, _Prompts | RequestError] | RequestError]:
        outputs = chain.from_iterable(map(self.fusion.outputs, requests))
        while together := list(islice(outputs, size)):
            self.tokenizer.read_ahead(together)
            for output in together:
                try:
                    yield output, self._prompts(output)
                except RequestError as error:
                    yield error if self.on_refused is None else (output, error)

    def _prompts(self, output: Request) -> _Prompts:
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
        layouts = tuple(map(self._layout, prompts))
        drawn_for = [output] * len(prompts) if self.fusion.is_of_logits else prompts
        return layouts, tuple(map(_seed, drawn_for))

    def _layout(self, request: Request) -> Layout:
        try:
            layout = self.strategy.layout(self.tokenizer(request))
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
