"""Tasks that flexmask and vLLM both run: decoding, first tokens, and a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from transformers import AutoTokenizer

from flexmask import Request, RequestTokenizer, TokenizedRequest
from flexmask.demo import model_path
from peer_jobs import Job
from prompt_work import PromptWork
from random_prompts import RandomPrompts
from timed_run import Way

PARTS = ("decode", "first_token", "dataset")
STRATEGIES = ("causal", "ensemble_isolation", "prefix_segment")
WAYS = ("none", "each", "vote", "mean", "ensemble_isolation", "prefix_segment")
VLLM_WAYS = ("causal", "none", "each")
"""The way that vLLM can run: prompts as they are."""


@dataclass(frozen=True)
class Settings:
    """One thing to measure.

    Attributes:
        shape: Shape of the model.
        device: ``cuda`` (bfloat16) or ``cpu`` (float32).
        parts: Some of `PARTS`.
        cases: Rows and tokens of prompts that decode, such as ``8x1024``.
        strategies: Strategies of these cases; vLLM runs `causal`.
        ways: Strategies and fusions of the data set; vLLM runs `none` and `each`.
        steps: Decode steps of a long generation.
        repeats: Runs of a case after the first.
        requests: Name of the file of questions; None for made-up questions of the same lengths.
        questions: Number of questions.
        max_new_tokens: Tokens generated for each question.
        time_limit_s: Seconds that each of the two processes may take.
    """

    shape: str
    device: str
    parts: tuple[str, ...]
    cases: tuple[str, ...]
    strategies: tuple[str, ...]
    ways: tuple[str, ...]
    steps: int
    repeats: int
    requests: str | None
    questions: int
    max_new_tokens: int
    time_limit_s: float

    @property
    def token_counts(self) -> tuple[int, ...]:
        """Numbers of tokens that the prompts of a case generate."""
        if "decode" in self.parts:
            return (1, 1 + self.steps)
        return (1,) if "first_token" in self.parts else ()


@dataclass(frozen=True)
class Task:
    """A job, and the least work in it.

    Attributes:
        job: The job of flexmask, whose prompts are fields of requests.
        vllm_job: The same prompts as token ids; None if vLLM cannot run this.
        rows: Prompts of a case, or questions of the data set.
        context: Slots of a prompt; None for the data set.
        work: The work of the last run.
    """

    job: Job
    vllm_job: Job | None
    rows: int
    context: int | None
    work: PromptWork


class Tasks:
    """Makes the tasks of a measurement.

    Attributes:
        settings: What is measured.
        requests: The questions.
    """

    def __init__(self, settings: Settings, requests: Sequence[Request] | None) -> None:
        """Prepare; questions are made up if ``requests`` is None."""
        tokenizer = AutoTokenizer.from_pretrained(model_path())
        self.settings = settings
        self._random = RandomPrompts(tokenizer)
        self._tokenizer = RequestTokenizer(tokenizer)
        if requests is None:
            requests = self._random.questions(settings.questions)
        self.requests = requests
        self._numbers = count()

    def all(self) -> Iterator[Task]:
        """Yield the tasks of every way one after another."""
        settings = self.settings
        for strategy in settings.strategies:
            for case in settings.cases:
                for new_tokens in settings.token_counts:
                    yield self._case(Way.named(strategy), case, new_tokens)
        if "dataset" in settings.parts:
            for name in settings.ways:
                job = Job(next(self._numbers), name, settings.max_new_tokens, (), times=2)
                yield self._task(Way.named(name), job, [self.requests], None)

    def _case(self, way: Way, case: str, new_tokens: int) -> Task:
        rows, context = map(int, case.split("x"))
        runs = [
            [self._random.request(way.strategy, context) for _ in range(rows)]
            for _ in range(1 + self.settings.repeats)
        ]
        job = Job(next(self._numbers), way.strategy.name, new_tokens, ())
        return self._task(way, job, runs, context)

    def _task(
        self, way: Way, job: Job, runs: Sequence[Sequence[Request]], context: int | None
    ) -> Task:
        """Put the prompts of ``runs`` into a job."""
        fields = tuple(tuple(map(_fields, requests)) for requests in runs)
        last = self._prompts(way, runs[-1])
        vllm_job = None
        if job.way in VLLM_WAYS:
            prompts = [*(self._prompts(way, requests) for requests in runs[:-1]), last]
            token_ids = tuple(tuple(map(whole_prompt, each)) for each in prompts)
            vllm_job = replace(job, prompts=token_ids)
        return Task(
            job=replace(job, prompts=fields),
            vllm_job=vllm_job,
            rows=len(runs[-1]),
            context=context,
            work=PromptWork.of(way.strategy, last),
        )

    def _prompts(self, way: Way, requests: Sequence[Request]) -> list[TokenizedRequest]:
        prompts = way.prompts(requests)
        self._tokenizer.read_ahead(prompts)
        return list(map(self._tokenizer, prompts))


def _fields(request: Request) -> dict[str, Any]:
    names = ("segments", "prefix", "suffix", "uuid")
    return {name: getattr(request, name) for name in names}


def whole_prompt(prompt: TokenizedRequest) -> list[int]:
    """Return the token ids of a prompt, for an engine that knows no segments."""
    parts = (prompt.prefix, *prompt.segments, prompt.tail)
    return [token for part in parts for token in part]
