"""The captured decode step, on a GPU."""

import pytest
import torch

from flexmask.attention.backend import _padded_groups, _without_padding
from flexmask.block_mask.cache import BlockMaskCache
from flexmask.engine.model_runner import ModelRunner
from flexmask.errors import FlexMaskWarning
from flexmask_strategies.prefix_segment import PrefixSegment
from oracles import random_request

LAYOUTS = [PrefixSegment().layout(random_request(seed, 9, [20, 30], 2)) for seed in (1, 2)]


def decode(runner, steps=12):
    runner.prepare(PrefixSegment(), len(LAYOUTS), 640)
    runner.prefill(LAYOUTS)
    token_ids = torch.tensor([[x.token_ids[-1]] for x in LAYOUTS], device=runner.device)
    logits = []
    for _ in range(steps):
        logits.append(runner.decode(token_ids))
        token_ids = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits)


@pytest.mark.gpu
def test_the_graph_gives_what_steps_without_it_give(models):
    runner = ModelRunner(models("llama", "flexmask", "cuda"), BlockMaskCache())
    with_graph = decode(runner)
    assert runner.no_graph_reason == ""
    runner.no_graph_reason = "asked for by this test"
    assert torch.equal(decode(runner), with_graph)


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_without_a_graph_and_says_so(models, monkeypatch):
    runner = ModelRunner(models("llama", "flexmask", "cuda"), BlockMaskCache())
    expected = decode(runner)
    step = runner._step

    def waiting_step(token_ids):
        token_ids.sum().item()  # waits for the device, which a capture forbids
        return step(token_ids)

    monkeypatch.setattr(runner, "_step", waiting_step)
    with pytest.warns(FlexMaskWarning, match="without a CUDA graph"):
        assert torch.equal(decode(runner), expected)


def test_padding_of_head_groups_is_taken_off_again():
    query = torch.randn(2, 6, 1, 4, device="meta")
    assert _padded_groups(query, 2).shape == (2, 6, 1, 4)  # only CUDA has the kernel
    padded = torch.arange(16.0).view(1, 8, 1, 2)
    kept = _without_padding(padded, heads=6, kv_heads=2)
    assert kept[0, :, 0, 0].tolist() == [0, 2, 4, 8, 10, 12]
