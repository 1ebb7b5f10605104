"""Evaluates a mask_mod exactly through torch.vmap, for operations without interval rules."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flexmask.block_mask.intervals.legality import (
    INDEX_DTYPES,
    check_call,
    check_index_dtypes,
    check_result,
)
from flexmask.mod_types import MaskMod
from flexmask.torch_internals import (
    TorchDispatchMode,
    index_by_tensors,
    returns_view,
    tree_leaves,
)

PROBED = 16
"""Number of queries and of keys that are evaluated to measure the memory of a pair."""
COMMON_BYTES = 8
"""The largest intermediate of a pair that callers assume: one int64."""

Indices = tuple[Tensor, Tensor, Tensor, Tensor]
Masks = tuple[Tensor, Tensor]
"""A mask, and the pairs for which it indexed a captured tensor out of range."""


class PairsByVmap:
    """Evaluates one mask_mod through torch.vmap, as torch's ``create_block_mask`` does."""

    def __init__(self, mask_mod: MaskMod, *, pointwise_only: bool) -> None:
        """Prepare the evaluation of a mask_mod.

        Args:
            mask_mod: The mask_mod.
            pointwise_only: Whether reductions are refused.
        """
        self._mask_mod = mask_mod
        self._mode = _CheckedMode(mask_mod, pointwise_only)
        self._probed: tuple[float, float] | None = None

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Masks:
        """Evaluate pairs, in several parts if a pair takes more memory than about one int64.

        Args:
            b: ``(N or 1,)``.
            h: ``(N or 1,)``.
            q_idx: ``(N, Q)``.
            kv_idx: ``(N or 1, K)``.

        Returns:
            The mask, and the pairs for which it indexed a captured tensor out of range:
            ``(N, Q, K)`` each.

        Raises:
            MaskError: If the mask_mod breaks a rule of FlexAttention.
        """
        tiles = len(q_idx)
        indices = (b.expand(tiles), h.expand(tiles), q_idx, kv_idx.expand(tiles, -1))
        shape = (tiles, q_idx.shape[1], kv_idx.shape[1])
        parts = math.ceil(self._bytes_per_pair(indices) / COMMON_BYTES)
        return self._in_parts(indices, shape, parts)

    def _in_parts(self, indices: Indices, shape: tuple[int, int, int], parts: int) -> Masks:
        """Evaluate in about ``parts`` parts: divide the tiles, then the queries, then the keys."""
        dim = next((dim for dim in range(3) if shape[dim] > 1), None)
        if parts <= 1 or dim is None:
            return self._evaluated(indices)
        count = min(parts, shape[dim])
        b, h, q_idx, kv_idx = indices
        rest = math.ceil(parts / count)
        pieces: list[Masks] = []
        for some in torch.arange(shape[dim]).tensor_split(count):
            piece = slice(int(some[0]), int(some[-1]) + 1)
            smaller = (
                (b[piece], h[piece], q_idx[piece], kv_idx[piece]),
                (b, h, q_idx[:, piece], kv_idx),
                (b, h, q_idx, kv_idx[:, piece]),
            )[dim]
            length = piece.stop - piece.start
            sizes = (*shape[:dim], length, *shape[dim + 1 :])
            pieces.append(self._in_parts(smaller, cast("tuple[int, int, int]", sizes), rest))
        masks, outside = zip(*pieces, strict=True)
        return torch.cat(masks, dim), torch.cat(outside, dim)

    def _evaluated(self, indices: Indices) -> Masks:
        def checked(*indices: Tensor) -> Masks:
            self._mode.outside = indices[0].new_zeros((), dtype=torch.bool)
            with self._mode:
                mask = self._mask_mod(*indices)
            check_result(self._mask_mod, mask)
            return mask, self._mode.outside

        over_keys = torch.vmap(checked, in_dims=(None, None, None, 0))
        over_queries = torch.vmap(over_keys, in_dims=(None, None, 0, None))
        over_tiles = torch.vmap(over_queries)
        with torch.no_grad():
            mask, outside = over_tiles(*indices)
        return mask, outside

    def _bytes_per_pair(self, indices: Indices) -> float:
        """Return the bytes of the largest intermediate per pair.

        It grows where tables keep dimensions: ``(kept[b, q_idx] == kv_idx).any()`` makes a row of
        bools for each pair, and ``kept[b].flip(0)[q_idx]`` a row for each tile.
        """
        b, h, q_idx, kv_idx = indices
        pairs_per_tile = q_idx.shape[1] * kv_idx.shape[1]
        if self._probed is None:
            one = (b[:1], h[:1], q_idx[:1, :1], kv_idx[:1, :1])
            some = (b[:1], h[:1], q_idx[:1, :PROBED], kv_idx[:1, :PROBED])
            of_one, of_some = (self._largest(x) for x in (one, some))
            pairs = some[2].numel() * some[3].numel()
            self._probed = of_one, max(0, of_some - of_one) / max(1, pairs - 1)
        per_tile, per_pair = self._probed
        return per_pair + per_tile / pairs_per_tile

    def _largest(self, indices: Indices) -> int:
        largest = _LargestResult()
        with largest:
            self._evaluated(indices)
        return largest.bytes


class _CheckedMode(TorchFunctionMode):
    """Indexes captured tensors under vmap, and records indices out of range.

    Attributes:
        outside: Whether an index of the present pair is out of range.
    """

    outside: Tensor

    def __init__(self, mask_mod: MaskMod, pointwise_only: bool) -> None:
        super().__init__()
        self._mask_mod = mask_mod
        self._pointwise_only = pointwise_only

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__:
            return self._index(args[0], args[1])
        check_call(self._mask_mod, func, args, kwargs, pointwise_only=self._pointwise_only)
        return func(*args, **kwargs)

    def _index(self, table: Tensor, index: Any) -> Tensor:
        leaves = tree_leaves(index)
        check_index_dtypes(self._mask_mod, leaves)
        if all(isinstance(x, Tensor) for x in leaves):
            items = leaves
        else:
            items = list(index) if isinstance(index, tuple) else [index]
        dim = 0
        for i, item in enumerate(items):
            if item is Ellipsis:
                dim = table.dim() - sum(x is not None for x in items[i + 1 :])
            elif _is_index(item):
                items[i] = self._in_range(item, table.shape[dim])
            dim += item is not None and item is not Ellipsis
        return index_by_tensors(table, tuple(items))

    def _in_range(self, index: Tensor, length: int) -> Tensor:
        is_outside = (index < -length) | (index >= length)
        self.outside = self.outside | (is_outside.any() if is_outside.dim() else is_outside)
        return index.clamp(-length, length - 1)


def _is_index(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype in INDEX_DTYPES


class _LargestResult(TorchDispatchMode):
    """Records the size of the largest tensor that is computed.

    Attributes:
        bytes: Its size so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in () if returns_view(func) else tree_leaves(result):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.numel() * x.itemsize)
        return result
