"""The command line with an engine that answers at once, without a model: run it as a program."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from flexmask.generation import Generation
from flexmask.request import Request


class QuickRun:
    """A run whose every answer is the first accepted one, or ``none``."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = requests
        self._is_stopped = False
        self.stats = SimpleNamespace(
            **dict.fromkeys(
                (
                    *("generations", "generated_tokens", "prompt_tokens", "computed_tokens"),
                    *("tokens_per_s", "prefill_s", "decode_s", "compilations", "batch_size"),
                    *("warm_compilations", "mask_hits", "mask_misses", "decode_peak_bytes"),
                    *("halvings", "capacity", "cold_groups", "copied_tokens", "prefills"),
                    *("decode_steps", "row_utilization", "first_token_s"),
                    *("cached_spans", "kept_spans"),
                ),
                0,
            )
        )

    def stop(self) -> None:
        self._is_stopped = True

    def __iter__(self) -> Iterator[Generation]:
        return (generation for batch in self.batches() for generation in batch)

    def batches(self) -> Iterator[list[Generation]]:
        for request in self._requests:
            if self._is_stopped:
                return
            text = request.answers[0] if request.answers else "none"
            yield [Generation(request, f" {text}", (1, 2), "length", 3)]


class QuickEngine:
    model = SimpleNamespace(
        dtype="float32",
        device=torch.device("cpu"),
        modules=list,
        parameters=lambda: [torch.empty(1, 1, 1)],  # those of experts, whose floor is not known
    )
    runner = SimpleNamespace(
        layer_windows={},
        prefill_kernel=None,
        decode_kernels={},
        bound=SimpleNamespace(),
        store=None,
    )

    def generation_rules(self) -> Any:
        return SimpleNamespace(eos_token_ids=(), stop_strings=(), applied=(), sampling=None)

    def generate(self, requests: Iterable[Request], strategy: Any, **options: Any) -> QuickRun:
        return QuickRun(requests)


def run() -> None:
    from flexmask_cli import __main__, planned_run

    options_module: Any = planned_run
    options_module.load_engine = lambda *arguments, **options: QuickEngine()
    __main__.run()


COMMAND = [sys.executable, os.path.abspath(__file__)]
"""As ``flexmask``."""

if __name__ == "__main__":
    run()
