"""Logits processors, applied to each batch row with its own tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexmask.engine.generation_rules import GenerationRules, apply_processors
from flexmask.engine.row_loading import to_device


class RowProcessors:
    """The logits processors of one prompt, and the tokens that they look at."""

    def __init__(
        self,
        rules: GenerationRules,
        prompt: Sequence[int],
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        """Make the processors of a prompt.

        Args:
            rules: The rules of the generation config.
            prompt: Its tokens, in storage order.
            max_new_tokens: Most tokens generated after it.
            device: Device of the logits.
        """
        self._processors = rules.processors(prompt, max_new_tokens, device)
        tokens = torch.tensor([[*prompt, *[0] * max_new_tokens]])
        self._token_ids = to_device(tokens, device)
        self._length = len(prompt)

    @property
    def is_full(self) -> bool:
        """True once the last token that may be generated has been appended."""
        return self._length == self._token_ids.shape[1]

    def __call__(self, logits: Tensor) -> Tensor:
        """Turn logits ``(1, V)`` in float32 into scores ``(1, V)``."""
        return apply_processors(self._processors, self._token_ids[:, : self._length], logits)

    def append(self, token_id: Tensor) -> None:
        """Append the chosen token, ``(1,)``."""
        self._token_ids[:, self._length] = token_id
        self._length += 1


class BatchProcessors:
    """The logits processors of the rows of a batch, from the model's generation config.

    They are applied row by row, because they look at all tokens of a row, and rows differ in
    length. So the tokens of a row do not depend on the batch that it is in. The executor makes
    them for a run.
    """

    def __init__(self, rules: GenerationRules, max_new_tokens: int, device: torch.device) -> None:
        """Start without rows.

        Args:
            rules: The rules of the generation config.
            max_new_tokens: Most tokens generated per row.
            device: Device of the logits.
        """
        self._rules = rules
        self._max_new_tokens = max_new_tokens
        self._device = device
        self._rows: dict[int, RowProcessors] = {}

    def load(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Make the processors of some rows for the prompts in them."""
        for row, prompt in zip(rows, prompts, strict=True):
            self._rows[row] = RowProcessors(
                self._rules, prompt, self._max_new_tokens, self._device
            )

    def __call__(self, logits: Tensor) -> Tensor:
        """Turn logits into scores.

        Args:
            logits: ``(B, V)``; not changed.

        Returns:
            Scores ``(B, V)`` in float32; the logits in rows without a prompt. All are NaN in a row
            whose largest logit is not finite, unless the generation config removes invalid values.
        """
        scores = logits.to(torch.float32, copy=True)
        invalid = ~scores.amax(-1, keepdim=True).isfinite()
        for row, processors in self._rows.items():
            scores[row : row + 1] = processors(scores[row : row + 1])
        if self._rules.keeps_invalid_values:
            scores.masked_fill_(invalid, torch.nan)
        return scores

    def append(self, token_ids: Tensor) -> None:
        """Append the chosen token of each row, ``(B, 1)``."""
        for row, processors in self._rows.items():
            processors.append(token_ids[row])
        self._rows = {row: one for row, one in self._rows.items() if not one.is_full}
