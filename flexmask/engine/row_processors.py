"""The logits processors of a batch, applied to each row with its own tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexmask.engine.generation_rules import GenerationRules, apply_processors


class RowProcessors:
    """The logits processors of one batch, from the model's generation config.

    They are applied row by row, because they look at all tokens of a row and rows differ in
    length. So the tokens of a row do not depend on the batch that it is in.
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
            rules: The rules of the generation config.
            prompts: Prompt tokens of each row, in storage order. Further rows only fill the batch,
                and their logits are left unchanged.
            max_new_tokens: Most tokens generated per row.
            device: Device of the logits.
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
            logits: ``(B, V)``; not changed.

        Returns:
            Scores ``(B, V)`` in float32. All are NaN in a row whose largest logit is not finite,
            unless the generation config removes invalid values.
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
        """Append the chosen token of each row, ``(B, 1)``."""
        self._token_ids.scatter_(1, self._ends, token_ids[: len(self._rows)])
        self._ends += 1
        self._lengths = [length + 1 for length in self._lengths]
