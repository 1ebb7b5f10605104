"""The order in which a BlockMask lists the tiles of a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALIGNMENT = 64
"""The halves of a pair start at multiples of 64 numbers: 256 bytes, torch's alignment on CUDA."""


def empty_pair(*shape: int, device: torch.device) -> Tensor:
    """Allocate one tensor for partial and for full tiles: ``(2, *shape)`` int32.

    Each half starts at a multiple of 256 bytes, because compiled kernels copy inputs that are not
    aligned to 16 bytes.
    """
    count = math.prod(shape)
    padded = -(-count // ALIGNMENT) * ALIGNMENT
    both = torch.empty(2, padded, dtype=torch.int32, device=device)
    return both[:, :count].view(2, *shape)


def order_tiles(is_listed: Tensor, counts: Tensor, indices: Tensor) -> None:
    """Write the listed tiles of each row first, in place and without host synchronisation.

    A row in which tiles 1 and 3 of 4 are listed has count 2 and indices ``1 3 0 2``: the listed
    tiles, then the others, both in ascending order, as in torch's BlockMasks.

    Args:
        is_listed: Which tiles a row lists, ``(..., columns)`` bool.
        counts: Receives the number of listed tiles, ``(...)`` int32.
        indices: Receives the tiles, ``(..., columns)`` int32.
    """
    rank = is_listed.cumsum(-1, dtype=torch.int32)
    count = rank[..., -1:]
    tile = torch.arange(is_listed.shape[-1], dtype=torch.int32, device=is_listed.device)
    place = torch.where(is_listed, rank - 1, count + tile - rank)
    indices.scatter_(-1, place.long(), tile.expand_as(place))
    counts.copy_(count[..., 0])
