"""Exact evaluation of a mask_mod through torch.vmap, for operations that have no rule."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flexmask.block_mask.rules import MaskMod, check_pointwise, check_result

INDEX_DTYPES = (torch.int64, torch.int32)


def pairs_by_vmap(
    mask_mod: MaskMod, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
) -> tuple[Tensor, Tensor]:
    """Evaluate a mask_mod as torch's own builder does.

    Args:
        mask_mod: What to evaluate.
        b: ``(N or 1,)``.
        h: ``(N or 1,)``.
        q_idx: ``(N, Q)``.
        kv_idx: ``(N or 1, K)``.

    Returns:
        The mask, and where it indexed a captured tensor out of range: ``(N, Q, K)`` each.

    Raises:
        MaskError: If the mask_mod breaks a rule of FlexAttention.
    """
    tiles = len(q_idx)
    mode = _PointwiseMode(mask_mod)

    def checked(*indices: Tensor) -> tuple[Tensor, Tensor]:
        mode.outside = indices[0].new_zeros((), dtype=torch.bool)
        with mode:
            mask = mask_mod(*indices)
        check_result(mask_mod, mask)
        return mask, mode.outside

    over_keys = torch.vmap(checked, in_dims=(None, None, None, 0))
    over_queries = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    over_tiles = torch.vmap(over_queries)
    with torch.no_grad():
        mask, outside = over_tiles(
            b.expand(tiles), h.expand(tiles), q_idx, kv_idx.expand(tiles, -1)
        )
    return mask, outside


class _PointwiseMode(TorchFunctionMode):
    """Makes captured tensors indexable under vmap, and notes indices out of range.

    Attributes:
        outside: Whether an index of the pair at hand is out of range.
    """

    outside: Tensor

    def __init__(self, mask_mod: MaskMod) -> None:
        super().__init__()
        self._mask_mod = mask_mod

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__:
            return self._index(args[0], args[1])
        check_pointwise(self._mask_mod, func, args, kwargs)
        return func(*args, **kwargs)

    def _index(self, table: Tensor, index: Any) -> Tensor:
        items = list(index) if isinstance(index, tuple) else [index]
        if not all(isinstance(x, Tensor) and x.dtype in INDEX_DTYPES for x in items):
            return table[index]
        for dim, item in enumerate(items):
            length = table.shape[dim]
            self.outside = self.outside | (item < -length) | (item >= length)
            items[dim] = item.clamp(-length, length - 1)
        # Tensor.__getitem__ would read a 0-d index on the host, which vmap forbids.
        return cast(Tensor, torch.ops.aten.index(table, items))
