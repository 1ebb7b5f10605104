"""Fusing the logits of rows that belong together, within a decode step.

The rows of a group, one per prompt of a request, get the same scores, so that they take the same
token. Tables say which rows those are::

    row                  0       1       2       3          rows 0 to 2 are one group, 3 another
    members              0 1 2   0 1 2   0 1 2   3 3 3
    weights              1 1 1   1 1 1   1 1 1   1 0 0      0: no member
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexmask.fusion import Fusion


class LogitFusion:
    """Fuses the logits of a batch, from buffers that stay in place.

    Scores of a group are computed from its rows alone, one after the other, so that they do not
    depend on what else is in the batch.
    """

    def __init__(
        self, fusion: Fusion, group_size: int, batch_size: int, device: torch.device
    ) -> None:
        """Prepare for batches.

        Args:
            fusion: One that `is_of_logits`.
            group_size: Rows of the largest group.
            batch_size: Rows of all.
            device: Where logits are.
        """
        self._fusion = fusion
        self._members = torch.zeros(batch_size, group_size, dtype=torch.long, device=device)
        self._weights = torch.ones(batch_size, group_size, device=device)

    def load(self, groups: Sequence[Sequence[float]]) -> None:
        """Say which rows belong together.

        Args:
            groups: Of each group, in the order of the rows, the weight of each row.
        """
        members = torch.zeros(self._members.shape, dtype=torch.long)
        weights = torch.zeros(self._weights.shape)
        start = 0
        for group in groups:
            rows = slice(start, start + len(group))
            members[rows] = start
            members[rows, : len(group)] = torch.arange(start, rows.stop)
            # Only their proportions count; as they are, float32 might not hold them.
            weights[rows, : len(group)] = torch.tensor([w / max(group) for w in group])
            start = rows.stop
        self._members.copy_(members)
        self._weights.copy_(weights)

    def __call__(self, logits: Tensor) -> Tensor:
        """Fuse.

        Args:
            logits: ``(B, V)``.

        Returns:
            Scores ``(B, V)`` in float32, the same for all rows of a group: mean logits, or logs
            of the largest probabilities. Their softmax is what to sample from.
        """
        logits = logits.float()
        weights = self._weights
        if self._fusion.weights == "confidence":
            confidence = logits.softmax(-1).amax(-1)
            weights = weights * confidence[self._members]
        return self._mean(logits, weights) if self._fusion.is_mean else self._max(logits, weights)

    def _mean(self, logits: Tensor, weights: Tensor) -> Tensor:
        shares = (weights / weights.sum(-1, keepdim=True))[..., None]
        mean = torch.zeros_like(logits)
        for members, share in zip(self._members.unbind(1), shares.unbind(1), strict=True):
            # What is no member has no part, not even by the NaN that an infinite logit makes.
            part = share * logits.index_select(0, members)
            mean += part.masked_fill_(share == 0, 0.0)
        return mean

    def _max(self, logits: Tensor, weights: Tensor) -> Tensor:
        log_probabilities, log_weights = logits.log_softmax(-1), weights.log()[..., None]
        largest = torch.full_like(logits, -torch.inf)
        for members, shift in zip(self._members.unbind(1), log_weights.unbind(1), strict=True):
            weighted = log_probabilities.index_select(0, members) + shift
            largest = torch.maximum(largest, weighted)
        return largest
