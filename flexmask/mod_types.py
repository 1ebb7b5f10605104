"""Types of the pointwise functions that FlexAttention takes: mask_mod, score_mod."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class MaskMod(Protocol):
    """A mask: ``(b, h, q_idx, kv_idx) -> bool tensor``, True where the query sees the key.

    ``b`` is the batch row, ``h`` the query head, ``q_idx`` and ``kv_idx`` the indices of query and
    key. All four are integer tensors: 0-d as FlexAttention compiles the function, and of shapes
    that broadcast where it is evaluated for many pairs. The result has their broadcast shape.
    """

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, /) -> Tensor:
        """Decide pairs of queries and keys."""


class ScoreMod(Protocol):
    """A change of attention scores: ``(score, b, h, q_idx, kv_idx) -> score``.

    The result has the shape and dtype of ``score``; the other arguments are those of `MaskMod`.
    """

    def __call__(
        self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, /
    ) -> Tensor:
        """Change the scores of pairs."""


class RowMod(Protocol):
    """A set of slots: ``(b, slot) -> bool tensor``, of the arguments' broadcast shape."""

    def __call__(self, b: Tensor, slot: Tensor, /) -> Tensor:
        """Decide slots."""
