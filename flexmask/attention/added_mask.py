"""Masks that are added to scores: 0 where a key is seen, the dtype's lowest number where not.

Models that compute scores in code of their own take masks in this form, as ``eager`` attention in
transformers does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmask.errors import AttentionError

HIDDEN = torch.finfo(torch.float16).min
"""What hides a key is at most this, in every dtype of scores."""


class OwnScoresError(AttentionError):
    """A model masks scores in code of its own, for which it needs a tensor."""


def added_mask(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask to add to scores of ``dtype``, in the shape of ``is_seen`` (bool)."""
    hidden = torch.finfo(dtype).min
    return torch.zeros_like(is_seen, dtype=dtype).masked_fill_(~is_seen, hidden)


def seen_through(mask: Tensor) -> Tensor:
    """Which keys a dense mask shows, in its shape: of bool, or one that is added to scores.

    Raises:
        AttentionError: If it changes scores besides.
    """
    if mask.dtype == torch.bool:
        return mask
    is_seen = mask == 0
    if not bool((is_seen | (mask <= HIDDEN)).all()):
        raise AttentionError(
            "the model adds more than a mask to scores (a bias by position, say), which flexmask "
            "does not compute; choose another attn_implementation for this model"
        )
    return is_seen
