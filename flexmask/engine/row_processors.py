"""Logits processors of a batch, each row by its own tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexmask.engine.generation_rules import GenerationRules, apply_processors


class RowProcessors:
    """Applies what a model's generation config asks for to the logits of one batch.

    Rows are taken one by one, since processors look at all tokens of a row and rows differ in
    length: so the tokens of a row never depend on the batch that it is in.
    """

    def __init__(
        self,
        rules: GenerationRules,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        """Make the processors of each row.

        Args:
            rules: What the generation config asks for.
            prompts: Token ids of each row, in storage order. Rows of the batch beyond them only
                fill it up, and are left as they are.
            max_new_tokens: Most tokens that follow.
            device: Where logits are.
        """
        self._keeps_invalid_values = rules.keeps_invalid_values
        self._rows = [rules.processors(prompt, max_new_tokens, device) for prompt in prompts]
        self._lengths = [len(prompt) for prompt in prompts]
        width = max(self._lengths) + max_new_tokens
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
        self._token_ids = torch.tensor(padded, device=device)
        self._ends = torch.tensor(self._lengths, device=device)[:, None]

    def __call__(self, logits: Tensor) -> Tensor:
        """Turn logits into scores.

        Args:
            logits: ``(B, V)``; left as they are.

        Returns:
            Scores ``(B, V)`` in float32. A row whose logits have no finite maximum stays without
            one, whatever its processors make of it.
        """
        scores = logits.to(torch.float32, copy=True)
        invalid = ~scores.amax(-1, keepdim=True).isfinite()
        for row, (processors, length) in enumerate(zip(self._rows, self._lengths, strict=True)):
            one = slice(row, row + 1)
            scores[one] = apply_processors(processors, self._token_ids[one, :length], scores[one])
        if self._keeps_invalid_values:
            scores.masked_fill_(invalid, torch.nan)
        return scores

    def append(self, token_ids: Tensor) -> None:
        """Take in the token that each row goes on with, ``(B, 1)``."""
        self._token_ids.scatter_(1, self._ends, token_ids[: len(self._rows)])
        self._ends += 1
        self._lengths = [length + 1 for length in self._lengths]
