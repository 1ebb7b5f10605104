"""The decode loop: steps that never wait for the host, which reads their tokens later."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from flexmask.engine.compiled_view import STEP_OPTIONS
from flexmask.engine.decode_graph import DecodeGraph
from flexmask.engine.graph_capture import GraphCapture
from flexmask.engine.logit_fusion import LogitFusion
from flexmask.engine.model_runner import ModelRunner
from flexmask.engine.ranks import Ranks, on_all_ranks
from flexmask.engine.row_loading import load_rows, to_device
from flexmask.engine.row_processors import BatchProcessors
from flexmask.engine.sampler import Sampler, most_likely
from flexmask.sampling import Sampling
from flexmask.tensor_parallel.collectives import copy_from_first_rank
from flexmask.torch_internals import compile_settings


class ChosenTokens(NamedTuple):
    """The tokens that a step has chosen, on the host.

    On CUDA they are there once the device has done what was queued before.

    Attributes:
        token_ids: ``(B, 1)``, the next token of each row. `NOT_FINITE` or `NO_TOKEN` ends a row
            for which no token can be chosen. In a row that has ended or has no prompt they have
            no meaning.
        logprobs: ``(B, 1 + K)`` float32, the log-probabilities of the chosen token and of the
            ``K`` most likely ones; None if they are not asked for.
        most_likely: ``(B, K)``, these tokens, the most likely first; None likewise.
    """

    token_ids: Tensor
    logprobs: Tensor | None = None
    most_likely: Tensor | None = None


class DecodeLoop:
    """Decodes the rows of batches of one size; `flexmask.engine.executor.Executor` makes it.

    A step computes logits, samples a token for each row, marks rows that have ended, and passes
    the tokens to the next step. Where logits are fused, all rows of a group take the token that is
    sampled from their fused logits. Each row has its own state, so prompts can be loaded into some
    rows between two steps, while the other rows go on.

    On CUDA a step is captured as a graph once and replayed: the whole step, or the part up to the
    logits where the model's generation config has processors, which the host applies row by row.
    Where a graph cannot be captured, a warning says so and steps run without one.

    Attributes:
        processors: The logits processors of the model's generation config, applied before logits
            are fused; None for none. The executor sets them for each run.
        capture: Captures the graphs, until one cannot be captured.
    """

    def __init__(
        self,
        runner: ModelRunner,
        sampling: Sampling,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        fusion: LogitFusion | None = None,
        top_logprobs: int | None = None,
    ) -> None:
        """Allocate the buffers of a step, for the batch size that ``runner`` is prepared for.

        Args:
            runner: Computes logits.
            sampling: The way tokens are chosen.
            max_new_tokens: Most tokens per row.
            eos_token_ids: Tokens that end a row.
            fusion: Fuses the logits of rows; None where each row is by itself.
            top_logprobs: Tokens, beside the chosen one, whose log-probabilities each step
                returns; None for no log-probabilities.
        """
        self._runner = runner
        rows, device = runner.bound.batch_size, runner.device
        self._fusion = fusion
        self.processors: BatchProcessors | None = None
        self._sampler = Sampler(sampling, rows, max_new_tokens, device)
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
        self._token_ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._reported = ChosenTokens(torch.zeros_like(self._token_ids))
        if top_logprobs is not None:
            logprobs = torch.zeros(rows, 1 + top_logprobs, device=device)
            most_likely = torch.zeros(rows, top_logprobs, dtype=torch.long, device=device)
            self._reported = self._reported._replace(logprobs=logprobs, most_likely=most_likely)
        self._has_ended = torch.ones(rows, 1, dtype=torch.bool, device=device)
        self._step_numbers = torch.zeros_like(self._token_ids)
        self._graphs: dict[tuple[bool, bool, tuple[str, ...]], DecodeGraph[Tensor | None]] = {}
        self.capture = GraphCapture("decoding runs")

    @property
    def ranks(self) -> Ranks:
        """The processes that hold the model."""
        return self._runner.ranks

    @on_all_ranks("loop", is_answered=False)
    def load(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[str],
        groups: Sequence[tuple[Sequence[int], Sequence[float]]] = (),
    ) -> None:
        """Load prompts into some rows, for the steps from now on; the other rows go on.

        Args:
            rows: The rows.
            prompts: Token ids of the prompt of each row; decoding starts with the last one.
            seeds: One per row; with the seed of sampling they determine what is sampled.
            groups: The rows of each group and their weights, where logits are fused.
        """
        self._sampler.load(rows, seeds)
        if self._fusion is not None:
            self._fusion.load(groups)
        if self.processors is not None:
            self.processors.load(rows, prompts)
        load_rows(self._token_ids, rows, torch.tensor([prompt[-1:] for prompt in prompts]))
        index = to_device(torch.tensor(rows), self._token_ids.device)
        self._has_ended.index_fill_(0, index, False)
        self._step_numbers.index_fill_(0, index, 0)

    @on_all_ranks("loop", is_answered=False)
    @torch.no_grad()
    def step(self) -> ChosenTokens:
        """Queue a step, and the copy of its tokens to the host."""
        processors = self.processors
        logits = self._replay_or_run(self._whole_step if processors is None else self._forward)
        if processors is not None:
            assert logits is not None
            self._choose(processors(logits))
            processors.append(self._token_ids)
        token_ids, *scores = self._reported
        copies = (None if scored is None else _on_host(scored) for scored in scores)
        return ChosenTokens(_on_host(token_ids), *copies)

    def _replay_or_run(self, step: Callable[[], Tensor | None]) -> Tensor | None:
        """Replay the graph of ``step``, captured at its first call; without CUDA, run ``step``."""
        if not self._token_ids.is_cuda or self.capture.no_graph_reason:
            return step()
        runner = self._runner
        kernels = tuple(runner.decode_kernels.values())
        key = (self.processors is None, runner.reads_key_table, kernels)
        if key not in self._graphs:
            state = (
                self._runner.bound.slots,
                self._token_ids,
                self._has_ended,
                self._step_numbers,
            )
            graph = self.capture.attempt(lambda: DecodeGraph(step, state))
            if graph is None:
                return step()
            self._graphs[key] = graph
        return self._graphs[key].replay()

    def _whole_step(self) -> None:
        self._choose(self._forward())

    def _forward(self) -> Tensor:
        return self._runner.decode(self._token_ids)

    def _choose(self, logits: Tensor) -> None:
        """Choose a token for each row, and pass it to the next step."""
        if self._fusion is not None:
            logits = self._fusion(logits)
        state = (self._reported.token_ids, self._token_ids, self._has_ended, self._step_numbers)
        has_others = self.ranks.size > 1
        if self._sampler.is_greedy and logits.is_cuda:
            with compile_settings(logits.device):
                _compiled_end_of_step()(logits, has_others, self._eos, *state)
        else:
            _take(self._sampler(logits, self._step_numbers), has_others, self._eos, *state)
        self._report_logprobs(logits)

    def _report_logprobs(self, logits: Tensor) -> None:
        """Report the log-probabilities by which the tokens were chosen, if they are asked for."""
        _, logprobs, most_likely = self._reported
        if logprobs is None or most_likely is None:
            return
        of_all = logits.float().log_softmax(-1)
        logprobs[:, :1] = of_all.gather(1, self._token_ids)
        if most_likely.shape[1]:
            logprobs[:, 1:], most_likely[:] = of_all.topk(most_likely.shape[1])


def _on_host(tensor: Tensor) -> Tensor:
    """Copy to the host; on CUDA the copy is queued."""
    if not tensor.is_cuda:
        return tensor.clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def _take(
    chosen: Tensor,
    has_others: bool,
    eos: Tensor,
    reported: Tensor,
    token_ids: Tensor,
    has_ended: Tensor,
    step_numbers: Tensor,
) -> None:
    """Write the chosen tokens to ``reported`` and to ``token_ids``, which the next step reads.

    A row that has ended repeats its last token. A row for which no token can be chosen ends too;
    the next step then reads token 0 for it, which has no meaning. Where other ranks hold parts of
    the model, all take the tokens of rank 0.
    """
    if has_others:
        copy_from_first_rank(chosen)
    chosen = torch.where(has_ended, token_ids, chosen)
    has_ended |= chosen < 0
    if len(eos):
        has_ended |= torch.isin(chosen, eos)
    reported.copy_(chosen)
    token_ids.copy_(chosen.clamp(min=0))
    step_numbers += 1


def _take_most_likely(logits: Tensor, has_others: bool, eos: Tensor, *state: Tensor) -> None:
    _take(most_likely(logits), has_others, eos, *state)


@cache
def _compiled_end_of_step() -> Callable[..., None]:
    """Compile `_take_most_likely` into a few kernels; op by op it takes twelve."""
    return torch.compile(_take_most_likely, fullgraph=True, dynamic=False, options=STEP_OPTIONS)
