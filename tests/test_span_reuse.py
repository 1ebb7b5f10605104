"""With and without reuse of keys and values, logits and tokens are the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from flexmask import Engine
from flexmask.block_mask.cache import BlockMaskCache
from flexmask.engine.model_runner import ModelRunner
from flexmask.errors import OptionError
from flexmask.kv_store.options import KVCacheOptions
from flexmask.plugins.registry import make_strategy
from oracles import oracle_tokens, random_request

SEGMENTS = (30, 22, 25)
WAYS = {
    "prefix_segment": {},
    "ensemble_isolation": {},
    "parallel_context": {},
    "adaptive_parallel": {},
    "block_attention": {},
    "tree": {},
    "few_shot_isolation": {},
    "boundary_repair": {"link_tokens": 3},
    "causal": {},
    "global_window": {},
}
"""Strategies, with parameters: those that a store helps, and some that share a prefix only."""


def memory(device):
    """Room for all spans of a test."""
    return KVCacheOptions(host_bytes=2**24, gpu_bytes=2**24 if device == "cuda" else 0)


@pytest.fixture
def traced(request, device):
    """On a CPU, layers run op by op; on a GPU they are compiled, and captured as graphs."""
    if device == "cpu":
        request.getfixturevalue("without_inductor")


@pytest.fixture
def runner(models, device, traced):
    runner = ModelRunner(models("llama", "flexmask", device), BlockMaskCache())
    runner.use_store(memory(device), "random", {})
    return runner


def requests():
    """Two requests of the same documents in another order, behind the same prefix."""
    first = random_request(3, 20, SEGMENTS, 6)
    return first, dataclasses.replace(first, segments=first.segments[::-1])


def logits(runner, strategy, layout):
    runner.prepare(strategy, 1, 256)
    plan = runner.plan({0: layout}, 3)
    runner.prefill(plan)
    return runner.decode(torch.tensor([[layout.token_ids[-1]]], device=runner.device)), plan


@pytest.mark.parametrize("name", WAYS)
def test_reused_keys_and_values_give_the_logits_of_a_dense_pass(name, runner, models, device):
    strategy = make_strategy(name, WAYS[name])
    dense = models("llama", "flexmask_dense", device)
    plans = []
    for request in (*requests(), requests()[0]):
        layout = strategy.layout(request)
        got, plan = logits(runner, strategy, layout)
        plans.append(plan)
        if name != "adaptive_parallel":  # whose scores the dense oracle does not change
            _, want = oracle_tokens(dense, strategy, layout, 1)
            assert (got - want).abs().max() < 1e-4
    assert plans[2].cached_spans > 0
    assert plans[2].computed_tokens < plans[0].computed_tokens
    if name in ("prefix_segment", "parallel_context", "adaptive_parallel", "block_attention"):
        assert plans[1].cached_spans == 4
        assert plans[1].computed_tokens == 5


def test_keys_are_turned_where_a_document_stands_at_another_position(runner, models, device):
    strategy = make_strategy("block_attention", {})
    first, second = requests()
    for request in (first, second):
        got, plan = logits(runner, strategy, strategy.layout(request))
    assert any(copy.old_position != copy.new_position for copy in plan.copies)
    dense = models("llama", "flexmask_dense", device)
    _, want = oracle_tokens(dense, strategy, strategy.layout(second), 1)
    assert (got - want).abs().max() < 1e-4


def test_a_store_in_a_folder_serves_another_engine_of_the_same_model_only(
    tmp_path, models, device, traced
):
    strategy = make_strategy("prefix_segment", {})
    layout = strategy.layout(requests()[0])
    options = KVCacheOptions(folder=tmp_path / "kv")
    wanted = None
    for cached in (0, 4):
        runner = ModelRunner(models("llama", "flexmask", device), BlockMaskCache())
        runner.use_store(options, "random", {"weights": "1"})
        got, plan = logits(runner, strategy, layout)
        assert plan.cached_spans == cached
        wanted = got if wanted is None else wanted
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
        assert runner.store is not None
        runner.store.close()
    runner = ModelRunner(models("llama", "flexmask", device), BlockMaskCache())
    with pytest.raises(Exception, match="weights"):
        runner.use_store(options, "random", {"weights": "2"})


def test_a_folder_needs_a_model_whose_files_are_known(tmp_path, models):
    options = KVCacheOptions(folder=tmp_path)
    with pytest.raises(OptionError, match="model_files"):
        Engine(models("llama", "flexmask", "cpu"), PreTrainedTokenizerFast, kv_cache=options)


def test_gpu_memory_needs_a_gpu(models):
    options = KVCacheOptions(gpu_bytes=2**20)
    with pytest.raises(OptionError, match="gpu_bytes needs a model on a GPU"):
        Engine(models("llama", "flexmask", "cpu"), PreTrainedTokenizerFast, kv_cache=options)


def test_a_cache_without_bytes_is_refused():
    with pytest.raises(OptionError, match="gpu_bytes, host_bytes or a folder"):
        KVCacheOptions()
    with pytest.raises(OptionError, match="got -1"):
        KVCacheOptions(gpu_bytes=-1)
