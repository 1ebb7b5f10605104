"""Peers that compute a pass for each choice: ``hf`` of lm-evaluation-harness, and a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from flexmask import Request, RequestTokenizer
from peer_tasks import whole_prompt

Scores = list[list[float]]
"""For each request the log-probabilities of its choices."""


class DensePeer(Protocol):
    """A peer in this process."""

    @property
    def name(self) -> str:
        """Its name in the table."""

    @property
    def model(self) -> PreTrainedModel:
        """Its model, whose passes are counted."""

    def score(self, requests: Sequence[Request]) -> Scores:
        """Score the choices of requests, each a single segment, from texts."""


@dataclass(frozen=True)
class PlainLoop:
    """One dense pass of transformers for each choice, the longest first, in batches.

    Attributes:
        model: The model.
        tokenize: Tokenizes requests.
        batch_size: Passes at once.
    """

    model: PreTrainedModel
    tokenize: RequestTokenizer
    batch_size: int
    name = "transformers"

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> Scores:
        """Score the choices of requests."""
        rows = [pair for request in requests for pair in passes(self.tokenize, request)]
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]) - len(rows[row][1]))
        found: dict[int, float] = {}
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            found.update(zip(some, self._batch([rows[row] for row in some]), strict=True))
        of_rows = (found[row] for row in range(len(rows)))
        return [[next(of_rows) for _ in request.choices] for request in requests]

    def _batch(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        device = self.model.device
        tokens = [torch.tensor([*prompt, *choice[:-1]]) for prompt, choice in rows]
        # Padding on the right is not seen under a causal mask.
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)
        logits = self.model(input_ids=padded, use_cache=False).logits
        scores = []
        for of_row, (prompt, choice) in zip(logits, rows, strict=True):
            own = of_row[len(prompt) - 1 :][: len(choice)].float().log_softmax(-1)
            scores.append(own.gather(1, torch.tensor(choice, device=device)[:, None]).sum())
        return torch.stack(scores).tolist()


class Harness:
    """The model ``hf`` of lm-evaluation-harness, which groups choices of one token."""

    name = "lm_eval hf"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> None:
        """Wrap a model.

        Raises:
            ImportError: If lm-evaluation-harness is not installed.
        """
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        self.model = model
        self._instance = Instance
        self._lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def score(self, requests: Sequence[Request]) -> Scores:
        """Score the choices of requests."""
        instances = [
            self._instance("loglikelihood", {}, (*request.segments, choice), number)
            for number, request in enumerate(requests)
            for choice in request.choices
        ]
        scores = iter(self._lm.loglikelihood(instances, disable_tqdm=True))
        return [[next(scores)[0] for _ in request.choices] for request in requests]


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same tensors, with transformers' own attention."""
    with torch.device(model.device):  # random weights take long on a CPU
        twin: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config), attn_implementation="sdpa", dtype=model.dtype
        )
    weights = model.state_dict()
    twin.load_state_dict({name: weights[name] for name in twin.state_dict()}, assign=True)
    twin.tie_weights()
    twin.eval().requires_grad_(False)
    return twin


def passes(tokenize: RequestTokenizer, request: Request) -> Iterator[tuple[list[int], list[int]]]:
    """Yield, for each choice, the tokens of its prompt and its own."""
    prompt = whole_prompt(tokenize(request))
    for choice in tokenize.choices(request):
        yield prompt, list(choice)


@contextmanager
def counted_tokens(model: PreTrainedModel) -> Iterator[list[int]]:
    """Collect the number of tokens of each pass of a model, padding included."""
    counts: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts.append((args[0] if args else kwargs["input_ids"]).numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()
