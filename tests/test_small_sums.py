"""The choice between NCCL and one kernel for small sums, with functions of torch replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from flexmask.tensor_parallel import collectives

DEVICE = torch.device("cpu", 0)


class SmallSums:
    """Takes the place of the kernel."""

    made: tuple[Any, ...]

    def __init__(self, *arguments: Any) -> None:
        SmallSums.made = arguments

    def takes(self, x: torch.Tensor) -> bool:
        return len(x) < 4

    def __call__(self, x: torch.Tensor) -> None:
        x.mul_(10)


@pytest.fixture
def ranks(monkeypatch):
    """Two ranks that reach each other's memory, of which the other says nothing."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: True)
    monkeypatch.setattr(collectives, "SmallSums", SmallSums)
    yield monkeypatch
    collectives.leave_small_sums()


def test_small_tensors_are_summed_by_the_kernel_and_others_by_nccl(ranks):
    assert collectives.use_small_sums(DEVICE) == ""
    assert SmallSums.made == (DEVICE, collectives.MOST_SMALL_BYTES)
    small, large = torch.ones(3), torch.ones(5)
    collectives.sum_over_ranks(small)
    collectives.sum_over_ranks(large)
    assert small.tolist() == [10.0] * 3
    assert large.tolist() == [1.0] * 5
    collectives.leave_small_sums()
    collectives.sum_over_ranks(small)
    assert small.tolist() == [10.0] * 3


def test_the_reason_for_nccl_is_told(ranks):
    ranks.setattr(dist, "get_world_size", lambda: 3)
    assert "3 GPUs" in collectives.use_small_sums(DEVICE)
    ranks.setattr(dist, "get_world_size", lambda: 2)
    ranks.setattr(torch.cuda, "can_device_access_peer", lambda own, other: False)
    assert "do not reach" in collectives.use_small_sums(DEVICE)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no memory\nthat others reach")

    ranks.setattr(torch.cuda, "can_device_access_peer", lambda own, other: True)
    ranks.setattr(collectives, "SmallSums", fail)
    assert collectives.use_small_sums(DEVICE) == "no memory that others reach"


def test_a_reason_of_another_rank_is_enough_for_nccl(ranks):
    ranks.setattr(dist, "all_reduce", lambda tensor: tensor.add_(1))
    assert "another rank" in collectives.use_small_sums(DEVICE)
    small = torch.ones(3)
    collectives.sum_over_ranks(small)
    assert small.tolist() == [2.0] * 3
