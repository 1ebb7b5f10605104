"""Operators that combine tensors of all ranks, of the default group of `torch.distributed`.

They are operators of torch, so torch.compile keeps them in its graphs as they are, and NCCL's
kernels are captured in CUDA graphs like any other.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from flexmask.torch_internals import SmallSums

_LIBRARY = torch.library.Library("flexmask", "FRAGMENT")
_LIBRARY.define("sum_over_ranks(Tensor(a!) x) -> ()")
_LIBRARY.define("gather_over_ranks(Tensor x) -> Tensor")
_LIBRARY.define("copy_from_first_rank(Tensor(a!) x) -> ()")


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Named `all_gather_single` since torch 2.13."""

MOST_SMALL_BYTES = 2**18
"""Largest tensor that `SmallSums` sums: those of decode steps. NCCL sums those of prefills."""

GPUS_IN_ONE_ORDER = (2, 4, 8)
"""Numbers of GPUs over which torch's kernel sums in the same order on each (torch 2.11)."""

_begun = 0
_small_sums: SmallSums | None = None


def use_small_sums(device: torch.device) -> str:
    """Sum small tensors by `SmallSums` where all GPUs reach each other's memory.

    Args:
        device: The rank's GPU.

    Returns:
        Why NCCL sums them; empty if it does not.
    """
    global _small_sums
    _small_sums = None
    size = dist.get_world_size()
    others = (other for other in range(size) if other != device.index)
    reason, sums = "", None
    if size not in GPUS_IN_ONE_ORDER:
        reason = f"{size} GPUs would each sum in an order of their own"
    elif not all(torch.cuda.can_device_access_peer(device.index, other) for other in others):
        reason = "GPUs do not reach each other's memory"
    has_reason = torch.tensor([bool(reason)], dtype=torch.int32, device=device)
    dist.all_reduce(has_reason)
    if not has_reason.item():
        try:
            sums = SmallSums(device, MOST_SMALL_BYTES)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
        has_reason.fill_(bool(reason))
        dist.all_reduce(has_reason)
    if has_reason.item():
        return reason or "another rank has no such memory"
    _small_sums = sums
    return ""


def leave_small_sums() -> None:
    """Sum all tensors by NCCL."""
    global _small_sums
    _small_sums = None


def begun() -> int:
    """Return the number of collectives that this process has begun, but for CUDA graphs."""
    return _begun


def _count(x: Tensor) -> None:
    global _begun
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        _begun += 1


def _sum_over_ranks(x: Tensor) -> None:
    """Replace a tensor by the sum of those of all ranks, which is bitwise the same on each."""
    dense = x.contiguous()
    if _small_sums is not None and _small_sums.takes(dense):
        _small_sums(dense)
    else:
        dist.all_reduce(dense)
    _count(x)
    if dense is not x:
        x.copy_(dense)


def _gather_over_ranks(x: Tensor) -> Tensor:
    """Join the tensors ``(..., N)`` of all ranks along the last dimension, in order of ranks."""
    size = dist.get_world_size()
    parts = x.new_empty(size * x.shape[0], *x.shape[1:])
    _all_gather(parts, x.contiguous())
    _count(x)
    return parts.view(size, *x.shape).movedim(0, -2).flatten(-2)


def _copy_from_first_rank(x: Tensor) -> None:
    """Replace a tensor by that of rank 0."""
    dense = x.contiguous()
    dist.broadcast(dense, src=0)
    _count(x)
    if dense is not x:
        x.copy_(dense)


def _fake_gather(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] * dist.get_world_size())


def _fake_in_place(x: Tensor) -> None:
    """Change nothing of a tensor that has no values."""


for _name, _function, _fake in (
    ("sum_over_ranks", _sum_over_ranks, _fake_in_place),
    ("gather_over_ranks", _gather_over_ranks, _fake_gather),
    ("copy_from_first_rank", _copy_from_first_rank, _fake_in_place),
):
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _device)
    torch.library.register_fake(f"flexmask::{_name}", _fake, lib=_LIBRARY)

# Overloads, and not packets of them: torch 2.11 takes a call of a packet in a traced graph for one
# without effect, and removes it where nothing uses its result.
sum_over_ranks = torch.ops.flexmask.sum_over_ranks.default
"""The operator; `_sum_over_ranks` documents it."""

gather_over_ranks = torch.ops.flexmask.gather_over_ranks.default
"""The operator; `_gather_over_ranks` documents it."""

copy_from_first_rank = torch.ops.flexmask.copy_from_first_rank.default
"""The operator; `_copy_from_first_rank` documents it."""
