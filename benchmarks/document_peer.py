"""Measures vLLM on requests with documents, as whole prompts and with its prefix cache."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from flexmask import Request, RequestTokenizer
from flexmask.demo import model_path
from peer_jobs import Job
from peer_tasks import whole_prompt
from vllm_process import run_vllm

WARM_UP = 16
"""Requests that run before anything is measured."""


@dataclass(frozen=True)
class Peer:
    """Figures of vLLM.

    Attributes:
        environment: Its versions and settings; None if it did not start.
        failure: The reason why it did not run everything; None if it did.
        total_s: Seconds for the requests of every way, from token ids to token ids.
        first_token_ms: Median milliseconds to the first token of one request.
        computed_tokens: Prompt tokens computed.
        cached_tokens: Prompt tokens found in its prefix cache.
    """

    environment: dict[str, Any] | None
    failure: str | None
    total_s: float | None = None
    first_token_ms: float | None = None
    computed_tokens: int | None = None
    cached_tokens: int | None = None

    def line(self) -> str:
        """Return the figures in the columns of the table, and what went wrong."""
        if self.total_s is None or self.first_token_ms is None:
            return f"vLLM: {self.failure}"
        shown = f"{self.total_s:9.2f}{'':18}{self.first_token_ms:10.1f}"
        shown += f"{self.computed_tokens:11,}{self.cached_tokens:11,}"
        return f"{'vLLM':24}{shown}" + (f"  ({self.failure})" if self.failure else "")


def measure_vllm(
    requests: Sequence[Request],
    *,
    shape: str,
    max_new_tokens: int,
    num_single: int,
    time_limit_s: float,
    python: str,
    site: Path | None,
) -> Peer:
    """Run requests as whole prompts: some to warm up, all of them, then single ones.

    Args:
        requests: The requests.
        shape: Shape of the model.
        max_new_tokens: Tokens to generate for each.
        num_single: Number of requests whose first token is measured.
        time_limit_s: As for `vllm_process.run_vllm`, like all that follows.
        python: The Python to run.
        site: The only folder on ``PYTHONPATH``; None to leave it as it is.
    """
    tokenize = RequestTokenizer(AutoTokenizer.from_pretrained(model_path()))
    prompts = tuple(whole_prompt(tokenize(request)) for request in requests)
    jobs = [
        Job(0, "causal", max_new_tokens, (prompts[:WARM_UP],)),
        Job(1, "causal", max_new_tokens, (prompts,)),
        Job(2, "causal", 1, tuple((prompt,) for prompt in prompts[:num_single])),
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = run_vllm(shape, jobs, Path(folder), time_limit_s, python, site)
    peer = Peer(report.environment, report.failure)
    if whole := report.outcomes.get(1):
        cached = whole.prompt_tokens - whole.computed_tokens
        peer = replace(peer, total_s=whole.first_s, cached_tokens=cached)
        peer = replace(peer, computed_tokens=whole.computed_tokens)
    if single := report.outcomes.get(2):
        median_s = statistics.median((single.first_s, *single.seconds))
        peer = replace(peer, first_token_ms=1e3 * median_s)
    return peer
