"""From requests to prompts, some at a time, and the next ones while the last are run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from flexmask.errors import RequestError
from flexmask.layout import Layout
from flexmask.request import Request
from flexmask.strategy import Strategy
from flexmask.tokenization import RequestTokenizer

OnRefused = Callable[[Request, RequestError], None]


@dataclass(frozen=True)
class Prompt:
    """A request, ready to be run.

    Attributes:
        number: Counts the prompts of a run, in request order.
        request: What to generate for.
        layout: Its tokens.
    """

    number: int
    request: Request
    layout: Layout


@dataclass(frozen=True)
class PromptPlanner:
    """Turns requests into prompts.

    Attributes:
        strategy: Who sees whom.
        tokenizer: Makes tokens of texts.
        max_new_tokens: Most tokens that are generated per request.
        context: Positions that the model knows; None for no limit.
        on_refused: Called with each request that cannot be run; None raises.
    """

    strategy: Strategy
    tokenizer: RequestTokenizer
    max_new_tokens: int
    context: int | None
    on_refused: OnRefused | None

    def windows(self, requests: Iterable[Request], size: int) -> Iterator[list[Prompt]]:
        """Plan ``size`` prompts at a time, the next ones in the background.

        Raises:
            RequestError: If a request cannot be run and there is no ``on_refused``.
        """
        planned = self._planned(requests)
        with ThreadPoolExecutor(1, "flexmask-prompts") as background:
            number = 0
            window = background.submit(list, islice(planned, size))
            while outcomes := window.result():
                window = background.submit(list, islice(planned, size))
                prompts = []
                for outcome in outcomes:
                    if isinstance(outcome, RequestError):
                        raise outcome
                    request, layout = outcome
                    if isinstance(layout, Layout):
                        prompts.append(Prompt(number, request, layout))
                        number += 1
                    elif self.on_refused is not None:
                        self.on_refused(request, layout)
                yield prompts

    def _planned(
        self, requests: Iterable[Request]
    ) -> Iterator[tuple[Request, Layout | RequestError] | RequestError]:
        for request in requests:
            try:
                yield request, self._layout(request)
            except RequestError as error:
                yield error if self.on_refused is None else (request, error)

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
