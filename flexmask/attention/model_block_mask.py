"""A BlockMask for transformers' model code, which expects masks to be tensors."""

from __future__ import annotations

from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmask.attention import DENSE_BACKEND
from flexmask.attention.added_mask import OwnScoresError
from flexmask.errors import AttentionError


class ModelBlockMask(BlockMask):
    """A BlockMask with the methods that model code calls on a dense mask ``(B, 1, Q, K)``."""

    dtype = torch.bool
    ndim = 4

    @classmethod
    def of(cls, mask: BlockMask) -> Self:
        """Return ``mask`` if it is a ModelBlockMask, else one that shares its index tensors."""
        if isinstance(mask, cls):
            return mask
        return cls.from_kv_blocks(
            mask.kv_num_blocks,
            mask.kv_indices,
            mask.full_kv_num_blocks,
            mask.full_kv_indices,
            BLOCK_SIZE=mask.BLOCK_SIZE,
            mask_mod=mask.mask_mod,
            seq_lengths=mask.seq_lengths,
            compute_q_blocks=False,
        )

    def dim(self) -> int:
        """Return 4."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return ``(B, 1, Q, K)``, or one of these sizes."""
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> Self:
        """Return itself; a static cache makes transformers call this on every mask."""
        return self

    def __radd__(self, scores: object) -> NoReturn:
        """Refuse addition to scores.

        Raises:
            OwnScoresError: Always.
        """
        raise _own_scores()

    __add__ = __radd__

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return the mask on a device.

        Raises:
            OwnScoresError: If a dtype is given, to which BlockMask would convert its indices.
        """
        if any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
            raise _own_scores()
        return super().to(*args, **kwargs)

    def __getitem__(self, index: int | Tensor | tuple[int | Tensor, ...] | Any) -> Any:
        """Return itself if ``index`` takes every element, as when model code slices to the keys.

        Raises:
            AttentionError: If it takes a part; BlockMask would take it as an index of tiles.
        """
        parts = index if isinstance(index, tuple) else (index,)
        if parts.count(Ellipsis) == 1:
            at = parts.index(Ellipsis)
            whole = (slice(None),) * (self.ndim + 1 - len(parts))
            parts = (*parts[:at], *whole, *parts[at + 1 :])
        if len(parts) <= self.ndim and all(map(_takes_all, parts, self.shape)):
            return self
        raise AttentionError(
            f"the model's code takes a part of an attention mask {tuple(self.shape)}, which a "
            "BlockMask does not allow; choose another attn_implementation for this model"
        )


def plain_indices(mask: BlockMask) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Copy the index tensors, so that they are not views of a larger tensor.

    Dynamo guards on the sizes of a view's base, so views of one joint tensor would compile again
    for another length.
    """
    full_num, full = mask.full_kv_num_blocks, mask.full_kv_indices
    return (
        mask.kv_num_blocks.clone(),
        mask.kv_indices.clone(),
        None if full_num is None else full_num.clone(),
        None if full is None else full.clone(),
    )


def _own_scores() -> OwnScoresError:
    return OwnScoresError(
        "the model masks scores in code of its own, which no attention backend replaces; choose "
        f"attn_implementation={DENSE_BACKEND!r}, which gives it a tensor to mask by"
    )


def _takes_all(part: object, size: int) -> bool:
    return isinstance(part, slice) and part.indices(size) == (0, size, 1)
