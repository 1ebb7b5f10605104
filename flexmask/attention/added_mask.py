"""Masks that are added to scores: 0 for keys that are seen, the dtype's minimum for others.

Models that compute scores in code of their own take masks in this form, as ``eager`` attention in
transformers does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmask.errors import AttentionError

HIDDEN = torch.finfo(torch.float16).min
"""An added number at most this hides a key, whatever the dtype of the scores."""


class OwnScoresError(AttentionError):
    """A model masks scores in code of its own, for which it needs a tensor."""


def added_mask(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask to add to scores of ``dtype``, in the shape of ``is_seen`` (bool)."""
    hidden = torch.finfo(dtype).min
    return torch.zeros_like(is_seen, dtype=dtype).masked_fill_(~is_seen, hidden)


def seen_through(mask: Tensor) -> Tensor:
    """Return as a bool tensor which keys a dense mask shows: a bool mask, or one added to scores.

    Raises:
        AttentionError: If the mask also changes the scores of keys that it shows.
    """
    if mask.dtype == torch.bool:
        return mask
    is_seen = mask == 0
    if not bool((is_seen | (mask <= HIDDEN)).all()):
        raise AttentionError(
            "the model adds more than a mask to scores (such as a position bias), which flexmask "
            "does not compute; choose another attn_implementation for this model"
        )
    return is_seen
