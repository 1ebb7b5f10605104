"""The BlockMask of a decode step, updated in place on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmask.block_mask.intervals.evaluator import MaskEvaluator
from flexmask.block_mask.intervals.interval import exact_index
from flexmask.block_mask.intervals.legality import mask_name
from flexmask.block_mask.intervals.stand_in import NoIntervalRule
from flexmask.block_mask.tile_order import empty_pair, order_tiles
from flexmask.errors import MaskError
from flexmask.mod_types import MaskMod
from flexmask.torch_internals import recompile_limit, tensor_indexing

RECOMPILE_LIMIT = 64
"""Each mask_mod, batch size and length compiles once; torch's default limit is 8."""


def check_row_mask(mask_mod: MaskMod, B: int, KV_LEN: int, device: torch.device | str) -> None:
    """Check that a mask_mod can be used for decode rows, on the first query of each row.

    Args:
        mask_mod: The mask.
        B: Number of rows.
        KV_LEN: Number of key slots.
        device: Device of the captured tensors.

    Raises:
        MaskError: If it breaks a rule of FlexAttention, or depends on the head.
    """
    rows, keys = torch.arange(B, device=device), torch.arange(KV_LEN, device=device)
    evaluator = MaskEvaluator(mask_mod, rows.device, pointwise_only=True)
    _first_queries(evaluator, rows, keys, (KV_LEN, KV_LEN))
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    row, slot = (exact_index(zero, n, evaluator) for n in (B, KV_LEN))
    try:
        # A result that depends on the head has one row for each head.
        heads = exact_index(zero.expand(2, 1), 1, evaluator)
        ends = evaluator.interval_ends(row, heads, slot, slot)
    except NoIntervalRule:
        return
    if ends.shape[1] > 1:
        name = mask_name(mask_mod)
        raise MaskError(f"{name} depends on the head; one decode row serves all heads at once")


class DecodeRowMask:
    """The BlockMask of one query per batch row, updated in place for each decode step.

    The query of row ``b`` is at slot ``q_slots[b]`` and never sees a key after that slot. With
    tiles of 4, a causal mask and slots 5 and 2, of 8 keys:

    ====  =======  ========================  =======  =====
    slot  keys     tile 0, tile 1            partial  full
    ====  =======  ========================  =======  =====
    5     0–5      all 4 keys, 2 of 4 keys   1        0
    2     0–2      3 of 4 keys, none         0        none
    ====  =======  ========================  =======  =====

    A tile is full if the row sees all of its keys and they all exist. (`create_block_mask` with
    one query has only partial tiles: its tiles have 128 queries, most of them past the end.)

    Args:
        mask_mod: The mask over slots, the same for all heads.
        B: Number of rows.
        KV_LEN: Number of key slots.
        device: Device of the index tensors and the captured tensors.
        BLOCK_SIZE: Keys per tile.
        compiles: Whether `update` runs through torch.compile. Default: on CUDA. The first
            update then takes seconds, unless the compile cache on disk contains it.

    Attributes:
        block_mask: BlockMask of shape (B, 1, 1, KV_LEN). `update` writes to its tensors and
            replaces none; its ``mask_mod`` reads ``q_slots``.
        q_slots: The slot of each row's query, ``(B,)`` int64; `update` writes it.

    Raises:
        MaskError: If the mask_mod breaks a rule of FlexAttention, or depends on the head.

    Example::

        rows = DecodeRowMask(mask_mod, B=2, KV_LEN=4096, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rows.update(q_idx)
            output = flex_attention(query, key, value, block_mask=rows.block_mask)
    """

    def __init__(
        self,
        mask_mod: MaskMod,
        B: int,
        KV_LEN: int,
        device: torch.device | str,
        BLOCK_SIZE: int = 128,
        *,
        compiles: bool | None = None,
    ) -> None:
        """Allocate the index tensors, with all queries at slot 0."""
        check_row_mask(mask_mod, B, KV_LEN, device)
        columns = -(-KV_LEN // BLOCK_SIZE)
        self.q_slots = q_slots = torch.zeros(B, dtype=torch.int64, device=device)
        self._device = q_slots.device
        self._compiles = self._device.type == "cuda" if compiles is None else compiles
        keys = torch.arange(columns * BLOCK_SIZE, device=device)
        self._is_key = keys < KV_LEN
        self._keys = keys.clamp(max=KV_LEN - 1)
        self._rows = torch.arange(B, device=device)

        def decode_row(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            slot = q_slots[b] + q_idx
            return mask_mod(b, h, slot, kv_idx) & (kv_idx <= slot)

        self._counts = empty_pair(B, 1, 1, device=self._device)
        self._indices = empty_pair(B, 1, 1, columns, device=self._device)
        self.block_mask = BlockMask.from_kv_blocks(
            self._counts[0],
            self._indices[0],
            self._counts[1],
            self._indices[1],
            BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE),
            mask_mod=decode_row,
            seq_lengths=(1, KV_LEN),
            compute_q_blocks=False,
        )
        self._evaluator = MaskEvaluator(
            decode_row, self._device, reads_host=False, pointwise_only=True
        )
        self.update(q_slots)

    def update(self, q_idx: Tensor) -> None:
        """Move to the queries at slots ``q_idx``, without host synchronisation.

        Args:
            q_idx: Slot of each row's query, less than KV_LEN, ``(B,)`` integers.
        """
        self.q_slots.copy_(q_idx)
        if self._compiles:
            self._update_compiled()
        else:
            lengths = (1, self.block_mask.seq_lengths[1])
            allowed = _first_queries(self._evaluator, self._rows, self._keys, lengths)
            _list_tiles(allowed & self._is_key, self._counts, self._indices)

    def _update_compiled(self) -> None:
        with recompile_limit(RECOMPILE_LIMIT):
            _compiled_update()(
                self.block_mask.mask_mod,
                self._rows,
                self._keys,
                self._is_key,
                self._counts,
                self._indices,
            )


@functools.cache
def _compiled_update() -> Callable[..., None]:
    return torch.compile(_update, fullgraph=True, dynamic=False)


def _update(
    mask_mod: MaskMod,
    rows: Tensor,
    keys: Tensor,
    is_key: Tensor,
    counts: Tensor,
    indices: Tensor,
) -> None:
    zero = torch.zeros((), dtype=torch.int64, device=rows.device)
    over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_rows = torch.vmap(over_keys, in_dims=(0, None, None, None))
    with tensor_indexing():
        allowed = over_rows(rows, zero, zero, keys)
    _list_tiles(allowed & is_key, counts, indices)


def _first_queries(
    evaluator: MaskEvaluator, rows: Tensor, keys: Tensor, lengths: tuple[int, int]
) -> Tensor:
    """Evaluate a mask of ``lengths`` (Q, K) for the first query of rows: ``(B, 1, keys)``."""
    rows = rows[:, None, None]
    zeros = torch.zeros_like(rows)
    return evaluator.pairs(
        exact_index(rows, len(rows), evaluator),
        exact_index(zeros, 1, evaluator),
        exact_index(zeros, lengths[0], evaluator),
        exact_index(keys[None, None], lengths[1], evaluator),
    )


def _list_tiles(allowed: Tensor, counts: Tensor, indices: Tensor) -> None:
    """Write the partial and full tiles of ``(B, ..., keys)`` to ``counts`` and ``indices``."""
    columns = indices.shape[-1]
    tiles = allowed.view(*indices.shape[1:], allowed.shape[-1] // columns)
    is_full = tiles.all(-1)
    order_tiles(torch.stack((tiles.any(-1) & ~is_full, is_full)), counts, indices)
