"""Builds exact BlockMasks for any mask_mod, in time proportional to the number of tiles.

docs/block-masks.md describes the method and its limits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmask import display
from flexmask.block_mask.decode_row import DecodeRowMask
from flexmask.block_mask.tile_classifier import TileClassifier
from flexmask.block_mask.tile_order import empty_pair, order_tiles
from flexmask.block_mask.tile_states import (
    EMPTY,
    FULL,
    PARTIAL,
    Axis,
    Decided,
    MaskShape,
)
from flexmask.errors import MaskError
from flexmask.mod_types import MaskMod
from flexmask.torch_internals import outside_graphs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DecodeRowMask", "MaskReport", "create_block_mask", "explain_mask"]

TILES_AT_ONCE = {"cpu": 2**15, "cuda": 2**23}
"""Number of tiles that are sorted at once, at 25 bytes each; on a CPU what suits one thread."""

NOT_IN_GRAPHS = (
    "a BlockMask cannot be built inside a compiled graph, because building looks at values; "
    "build it before the compiled function and pass it in"
)

Listed = tuple[Tensor, Tensor, Tensor, Tensor]
"""Counts and indices of each row's partial tiles, and of its full ones."""


@outside_graphs(NOT_IN_GRAPHS)
def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    *,
    compute_q_blocks: bool = False,
    q_offset: int = 0,
    memory_bytes: int = 256 * 2**20,
    pointwise_only: bool = False,
) -> BlockMask:
    """Build the BlockMask that torch's ``create_block_mask`` builds, without an S×S mask.

    The index tensors are bitwise equal to torch's. Time and memory are proportional to the number
    of tiles; pairs are evaluated, in chunks, only in tiles that intervals cannot decide.

    A causal mask with tiles of 4, six queries and eight keys has two rows of two tiles. The
    tile of queries 4–7 and keys 0–3 extends past the last query, so it is partial, not full::

        keys       0 1 2 3 │ 4 5 6 7         kv_num_blocks       1 2
        queries 0  x       │                 kv_indices          0 1
                1  x x     │                                     0 1
                2  x x x   │                 full_kv_num_blocks  0 0
                3  x x x x │                 full_kv_indices     0 1
               ────────────┼───────────                          0 1
                4  x x x x │ x
                5  x x x x │ x x

    Row ``i`` of ``kv_indices`` lists its ``kv_num_blocks[i]`` partial tiles first; the other tiles
    follow, and kernels do not read them.

    Args:
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, made of pointwise tensor operations.
        B: Number of batch rows; None for one mask that all rows share.
        H: Number of query heads; None for one mask that all heads share.
        Q_LEN: Number of queries.
        KV_LEN: Number of keys.
        device: Device of the mask and of captured tensors. Default: the accelerator if there is
            one, as in torch.
        BLOCK_SIZE: Tile size, or queries and keys per tile.
        compute_q_blocks: Whether to list also the query tiles of each key tile. Only backward
            passes need them; they double the size of the BlockMask.
        q_offset: Index of the first query, for decode and chunked prefill: query row ``i`` is
            ``q_idx = q_offset + i``, here and in the BlockMask's own ``mask_mod``.
        memory_bytes: Approximate limit of memory for evaluation, in addition to 25 bytes per tile
            (8 of them for the BlockMask) and 32 bytes per tile that intervals leave undecided. At
            least one sub-tile is evaluated at a time.
        pointwise_only: Whether to refuse a mask_mod that reduces, as in
            ``(kept[b, q_idx] == kv_idx).any()``. Its BlockMask can be built, but FlexAttention
            cannot compile it into a kernel.

    Returns:
        BlockMask with ``kv_indices`` and ``full_kv_indices`` of shape
        ``(B, H, ceil(Q_LEN / BLOCK_SIZE[0]), ceil(KV_LEN / BLOCK_SIZE[1]))``.

    Raises:
        MaskError: If a size is not positive, or the mask_mod breaks a rule of FlexAttention: it
            does not return a bool tensor, reads a value, reduces in spite of ``pointwise_only``,
            or indexes a captured tensor that is too short or on another device.
    """
    shape = _mask_shape(B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE, q_offset, memory_bytes)
    tiles = TileClassifier(mask_mod, shape, pointwise_only=pointwise_only).classify()
    return _block_mask(tiles.states, mask_mod, shape, compute_q_blocks)


@dataclass(frozen=True, slots=True)
class MaskReport:
    """The tiles of a mask, and how they were decided; `explain_mask` returns it.

    Attributes:
        block_mask: The BlockMask.
        tiles_empty: Number of tiles without an allowed pair, over all batch rows and heads.
        tiles_partial: Number of tiles with some allowed pairs, or that extend past an end.
        tiles_full: Number of tiles in which all pairs are allowed.
        allowed_pairs: Exact number of allowed (query, key) pairs.
        density: Allowed pairs as a fraction of all pairs.
        block_mask_bytes: Size of the BlockMask's tensors.
        decided_by_intervals: Number of tiles decided without evaluating pairs.
        decided_by_evaluation: Number of tiles in which pairs were evaluated.
        build_ms: Milliseconds to build the BlockMask, without counting pairs.
        states: State of each tile, `tile_states.EMPTY`, PARTIAL or FULL,
            ``(B, H, rows, columns)`` uint8.
        decided: How each was decided, as `tile_states.Decided`, in the same shape.
    """

    block_mask: BlockMask
    tiles_empty: int
    tiles_partial: int
    tiles_full: int
    allowed_pairs: int
    density: float
    block_mask_bytes: int
    decided_by_intervals: int
    decided_by_evaluation: int
    build_ms: float
    states: Tensor
    decided: Tensor

    def plot(self, ax: Axes | None = None, *, b: int = 0, h: int = 0) -> Axes:
        """Draw the tiles of a batch row and head, with matplotlib (``flexmask[plot]``)."""
        return display.plot(self, ax, b=b, h=h)

    def _repr_html_(self) -> str:
        return display.html(self)


@outside_graphs(NOT_IN_GRAPHS)
def explain_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    *,
    compute_q_blocks: bool = False,
    q_offset: int = 0,
    memory_bytes: int = 256 * 2**20,
    pointwise_only: bool = False,
) -> MaskReport:
    """Build a BlockMask, and report its tiles and how they were decided.

    Arguments and errors are those of `create_block_mask`. Counting the pairs of partial tiles may
    take longer than building.
    """
    shape = _mask_shape(B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE, q_offset, memory_bytes)
    started = _now_ms(shape.device)
    classifier = TileClassifier(mask_mod, shape, pointwise_only=pointwise_only)
    tiles = classifier.classify(records=True)
    block_mask = _block_mask(tiles.states, mask_mod, shape, compute_q_blocks)
    build_ms = _now_ms(shape.device) - started
    assert tiles.decided is not None
    states = tiles.states.expand(shape.B, shape.H, -1, -1)
    decided = tiles.decided.expand(states.shape)
    by_evaluation = (decided == Decided.BY_SAMPLES) | (decided == Decided.BY_PAIRS)
    evaluated = int(by_evaluation.sum())
    empty, partial, full = (int((states == state).sum()) for state in (EMPTY, PARTIAL, FULL))
    allowed = classifier.allowed_pairs(tiles.states)
    return MaskReport(
        block_mask=block_mask,
        tiles_empty=empty,
        tiles_partial=partial,
        tiles_full=full,
        allowed_pairs=allowed,
        density=allowed / (shape.B * shape.H * Q_LEN * KV_LEN),
        block_mask_bytes=_tensor_bytes(block_mask),
        decided_by_intervals=states.numel() - evaluated,
        decided_by_evaluation=evaluated,
        build_ms=build_ms,
        states=states,
        decided=decided,
    )


def _mask_shape(
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None,
    BLOCK_SIZE: int | tuple[int, int],
    q_offset: int,
    memory_bytes: int,
) -> MaskShape:
    q_tile, kv_tile = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else BLOCK_SIZE
    B, H = 1 if B is None else B, 1 if H is None else H
    sizes = {"B": B, "H": H, "Q_LEN": Q_LEN, "KV_LEN": KV_LEN, "memory_bytes": memory_bytes}
    for name, size in (sizes | {"BLOCK_SIZE": min(q_tile, kv_tile)}).items():
        if size < 1:
            raise MaskError(f"{name} must be positive, got {size}")
    if q_offset < 0:
        raise MaskError(f"q_offset must not be negative, got {q_offset}")
    if device is None:
        # A build of torch for CUDA names it even without a GPU, unless it is asked to check.
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    target = torch.empty(0, device=device)
    q, kv = Axis(q_offset, Q_LEN, q_tile), Axis(0, KV_LEN, kv_tile)
    return MaskShape(B, H, q, kv, target.device, memory_bytes)


def _block_mask(
    states: Tensor, mask_mod: MaskMod, shape: MaskShape, compute_q_blocks: bool
) -> BlockMask:
    lengths = (shape.q.length, shape.kv.length)
    kv = _listed(states, shape)
    q = _listed(states.mT, shape) if compute_q_blocks else (None, None, None, None)
    tile = (shape.q.tile, shape.kv.tile)
    shifted = _shifted(mask_mod, shape)
    return BlockMask(lengths, kv[0], kv[1], kv[2], kv[3], q[0], q[1], q[2], q[3], tile, shifted)


def _shifted(mask_mod: MaskMod, shape: MaskShape) -> MaskMod:
    if shape.q.start == 0:
        return mask_mod
    # A captured Python int would recompile attention for each offset; a tensor does not.
    offset = torch.full((), shape.q.start, device=shape.device)

    def shifted(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx + offset, kv_idx)

    return shifted


def _listed(states: Tensor, shape: MaskShape) -> Listed:
    """List the partial and the full tiles of each row of tiles."""
    *batch, rows, columns = states.shape
    device = states.device
    wanted = torch.arange(PARTIAL, FULL + 1, dtype=torch.uint8, device=device).view(2, 1, 1, 1, 1)
    counts = empty_pair(*batch, rows, device=device)
    indices = empty_pair(*batch, rows, columns, device=device)
    limit = TILES_AT_ONCE["cpu" if device.type == "cpu" else "cuda"]
    step = max(1, limit // (2 * columns * batch[0] * batch[1]))
    for row in range(0, rows, step):
        some = slice(row, row + step)
        order_tiles(states[..., some, :] == wanted, counts[..., some], indices[..., some, :])
    num_partial, num_full = counts.expand(2, shape.B, shape.H, -1)
    partial, full = indices.expand(2, shape.B, shape.H, -1, -1)
    return (
        num_partial.contiguous(),
        partial.contiguous(),
        num_full.contiguous(),
        full.contiguous(),
    )


def _tensor_bytes(block_mask: BlockMask) -> int:
    tensors = (x for x in block_mask.as_tuple() if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)


def _now_ms(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3
