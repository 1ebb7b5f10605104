"""The output head of a model: from hidden states to log-probabilities, in bounded memory."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from flexmask.engine.shared_tensors import tensors_by_id

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}
"""Most bytes of logits in float32 that exist at once, by type of device."""


class TokenScores(NamedTuple):
    """The scores of ``N`` tokens.

    Attributes:
        logprobs: ``(N,)`` float32, natural logarithms of the tokens' probabilities; NaN where the
            logits hold NaN.
        is_greedy: ``(N,)`` bool, True where no other token is more likely.
    """

    logprobs: Tensor
    is_greedy: Tensor


class OutputHead:
    """Everything of a causal language model behind its base model; the model runner makes it.

    It runs the model's own forward with hidden states that were computed before, so whatever the
    model does to logits (scaling, capping) is done. The model's tensors are shared.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Copy the module tree of ``model`` without its base model."""
        self._states = _GivenStates()
        shared = tensors_by_id(model)
        self._head = copy.deepcopy(model, {**shared, id(model.base_model): self._states})
        self._device_type = model.device.type

    def score(
        self, output: BaseModelOutputWithPast, places: Tensor, token_ids: Tensor
    ) -> TokenScores:
        """Score a token after each of some places of a stream.

        Args:
            output: The output of the base model, with hidden states ``(1, T, D)``.
            places: ``(N,)`` places in the stream.
            token_ids: ``(N,)`` the token that follows each.
        """
        vocabulary = self._head.config.get_text_config().vocab_size
        most = max(1, CHUNK_BYTES[self._device_type] // (4 * vocabulary))
        parts = [
            _token_scores(self._logits(output, some), tokens)
            for some, tokens in zip(places.split(most), token_ids.split(most), strict=True)
        ]
        return TokenScores(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _logits(self, output: BaseModelOutputWithPast, places: Tensor) -> Tensor:
        """Return the logits ``(N, V)`` of what follows some places."""
        assert output.last_hidden_state is not None
        some = copy.copy(output)
        some.last_hidden_state = output.last_hidden_state[:, places]
        self._states.output = some
        logits: Tensor = self._head(input_ids=places[None], use_cache=False).logits
        self._states.output = None
        return logits[0].float()


class _GivenStates(nn.Module):
    """Stands in for a base model: returns an output that is there already."""

    output: BaseModelOutputWithPast | None = None

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast | None:
        return self.output


def _token_scores(logits: Tensor, token_ids: Tensor) -> TokenScores:
    chosen = logits.gather(1, token_ids[:, None])[:, 0]
    return TokenScores(chosen - logits.logsumexp(-1), logits.argmax(-1) == token_ids)
