"""The group of ranks in `torch.distributed`: their devices, and how a process joins and leaves."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from flexmask.attention.flex_call import PrefillKernel
from flexmask.device import resolve_device
from flexmask.errors import FlexMaskWarning, OptionError
from flexmask.tensor_parallel.collectives import leave_small_sums, use_small_sums
from flexmask.tensor_parallel.plan import RankOf
from flexmask.torch_internals import abort_collectives, note_compile_cache

TIMEOUT = timedelta(hours=1)
"""Time that a rank waits for others, which may be compiling."""

LoadShard = Callable[[RankOf, torch.device], PreTrainedModel]
"""Loads the shard of a rank to its device; every process imports it by its name."""


@dataclass(frozen=True)
class RankSpec:
    """All that a process needs to become a rank.

    Attributes:
        place: The rank.
        port: Port of the store by which ranks find each other.
        device_type: ``cpu`` or ``cuda``.
        load_shard: Loads the rank's shard.
        prefill_kernel: The kernel that computes prompts; None to choose.
        threads: Threads of torch.
        precision: Precision of products in float32.
    """

    place: RankOf
    port: int
    device_type: str
    load_shard: LoadShard
    prefill_kernel: PrefillKernel | None
    threads: int
    precision: str

    @property
    def device(self) -> torch.device:
        """The rank's device."""
        return rank_device(self.device_type, self.place.rank)


def device_of_ranks(device: str, size: int) -> str:
    """Return the type of the device of ranks.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        size: Number of ranks.

    Raises:
        OptionError: If there are fewer GPUs than ranks, or the device names one GPU.
    """
    if device.startswith("cuda:"):
        raise OptionError(
            f"`tensor_parallel={size}` takes the first GPUs; pass `device=cuda`, got {device!r}, "
            "and choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    kind = resolve_device(device).type
    if kind == "cuda" and torch.cuda.device_count() < size:
        raise OptionError(
            f"`tensor_parallel={size}` needs {size} GPUs, and torch sees "
            f"{torch.cuda.device_count()}"
        )
    return kind


def rank_device(device_type: str, rank: int) -> torch.device:
    """Return the device of a rank: the GPU of its number, or the CPU."""
    return torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")


def make_store(port: int, size: int, *, is_first: bool) -> Any:
    """Make the store by which ranks find each other.

    Args:
        port: Its port; 0 for one that is free.
        size: Number of ranks.
        is_first: True in rank 0, which others reach.
    """
    store: Any = dist  # whose stubs leave it out
    return store.TCPStore("127.0.0.1", port, size, is_master=is_first, wait_for_workers=False)


def join_group(spec: RankSpec, store: Any) -> None:
    """Join the group of all ranks, by NCCL on GPUs and gloo on CPUs."""
    on_gpu = spec.device_type == "cuda"
    if on_gpu:
        torch.cuda.set_device(spec.device)
        # Otherwise ranks meet while they capture a graph: where one could not, the others would
        # wait for it.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    torch.set_num_threads(spec.threads)
    note_compile_cache()
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=spec.place.rank,
        world_size=spec.place.size,
        timeout=TIMEOUT,
        device_id=spec.device if on_gpu else None,
    )
    if on_gpu and (reason := use_small_sums(spec.device)):
        warnings.warn(
            f"NCCL sums all tensors over the ranks, which takes longer: {reason}",
            FlexMaskWarning,
            stacklevel=2,
        )


def leave_group(device_type: str) -> None:
    """Leave the group of all ranks, without waiting for the others."""
    leave_small_sums()
    if dist.is_initialized():
        if device_type == "cuda":
            abort_collectives()
        else:
            dist.destroy_process_group()
