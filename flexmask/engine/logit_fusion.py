"""Fusion of the logits of several batch rows, within a decode step.

The rows of a group, one per prompt of a request, get the same scores, so that they take the same
token. Two tables hold the rows of each group, which may be any rows::

    row                  0       1       2       3          rows 0, 1, 3 are one group, 2 another
    members              0 1 3   0 1 3   2 2 2   0 1 3
    weights              1 1 1   1 1 1   1 0 0   1 1 1      weight 0: not a member
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexmask.engine.row_loading import load_rows
from flexmask.fusion import Fusion


class LogitFusion:
    """Fuses the logits of the rows of each group of a batch; the executor makes it.

    Its buffers stay in place, so a captured step can use it. The scores of a group are computed
    from its rows alone, one after the other, so they do not depend on the rest of the batch.
    """

    def __init__(
        self, fusion: Fusion, group_size: int, batch_size: int, device: torch.device
    ) -> None:
        """Allocate the tables for batches of one size; each row is a group of its own.

        Args:
            fusion: A fusion that `is_of_logits`.
            group_size: Rows of the largest group.
            batch_size: Rows of a batch.
            device: Device of the logits.
        """
        self._fusion = fusion
        own = torch.arange(batch_size, device=device)[:, None]
        self._members = own.repeat(1, group_size)
        self._weights = torch.zeros(batch_size, group_size, device=device)
        self._weights[:, 0] = 1.0

    def load(self, groups: Sequence[tuple[Sequence[int], Sequence[float]]]) -> None:
        """Load groups; the rows of other groups keep theirs.

        Args:
            groups: The rows of each group and their weights.
        """
        size = self._members.shape[1]
        rows = [row for own, _ in groups for row in own]
        members = torch.zeros(len(rows), size, dtype=torch.long)
        weights = torch.zeros(len(rows), size)
        start = 0
        for own, given in groups:
            stop, count = start + len(own), len(own)
            members[start:stop] = own[0]
            members[start:stop, :count] = torch.tensor(own)
            # Only their proportions count; unscaled, they may be out of the range of float32.
            weights[start:stop, :count] = torch.tensor([weight / max(given) for weight in given])
            start = stop
        load_rows(self._members, rows, members)
        load_rows(self._weights, rows, weights)

    def __call__(self, logits: Tensor) -> Tensor:
        """Fuse the logits of each group.

        Args:
            logits: ``(B, V)``.

        Returns:
            Scores ``(B, V)`` in float32, the same for all rows of a group: mean logits, or the
            logarithms of mean or largest probabilities. Tokens are sampled from their softmax.
        """
        logits = logits.float()
        weights = self._weights
        if self._fusion.weights == "confidence":
            confidence = logits.softmax(-1).amax(-1)
            weights = weights * confidence[self._members]
        if self._fusion.name == "mean_prob":
            return self._mean(logits.softmax(-1), weights).log()
        return self._mean(logits, weights) if self._fusion.is_mean else self._max(logits, weights)

    def _mean(self, logits: Tensor, weights: Tensor) -> Tensor:
        shares = (weights / weights.sum(-1, keepdim=True))[..., None]
        mean = torch.zeros_like(logits)
        for members, share in zip(self._members.unbind(1), shares.unbind(1), strict=True):
            # Zero times infinity is NaN: rows of weight 0 must not count by that either.
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
