from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from flexmask.block_mask import create_block_mask
from flexmask.block_mask.cache import BlockMaskCache, BlockMaskKey
from flexmask.mask_mods import causal
from flexmask_strategies.causal import Causal
from flexmask_strategies.prefix_segment import PrefixSegment

KEY = BlockMaskKey(
    strategy=Causal(),
    layouts=(b"one",),
    window=None,
    q_length=256,
    kv_length=256,
    reused=(),
    block_size=(128, 128),
    device="cpu",
)


def build():
    return create_block_mask(causal, 1, None, 256, 256)


def build_again() -> Any:
    return 1 / 0


def test_a_mask_is_built_once_and_joined_to_the_mask_mod_of_the_moment():
    cache = BlockMaskCache()

    def other(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    first = cache.get(KEY, causal, build)
    second = cache.get(KEY, other, build_again)
    assert (first.mask_mod, second.mask_mod) == (causal, other)
    assert torch.equal(first.kv_indices, second.kv_indices)
    assert (cache.stats.hits, cache.stats.misses) == (1, 1)


def test_every_part_of_the_key_makes_another_mask():
    changes: dict[str, Any] = {
        "strategy": PrefixSegment(),
        "layouts": (b"two",),
        "window": 64,
        "q_length": 384,
        "kv_length": 384,
        "block_size": (64, 64),
        "device": "cuda",
    }
    cache = BlockMaskCache()
    for key in [KEY, *(replace(KEY, **{name: value}) for name, value in changes.items())]:
        cache.get(key, causal, build)
    assert cache.stats.hits == 0
    assert cache.stats.entries == len(changes) + 1
    parameters = replace(KEY, strategy=PrefixSegment(positions="sequential"))
    cache.get(parameters, causal, build)
    assert cache.stats.hits == 0


def test_the_least_recently_used_mask_leaves_when_bytes_run_out():
    one = BlockMaskCache()
    one.get(KEY, causal, build)
    cache = BlockMaskCache(max_bytes=2 * one.stats.bytes)
    keys = [replace(KEY, layouts=(name,)) for name in (b"a", b"b", b"c")]
    cache.get(keys[0], causal, build)
    cache.get(keys[1], causal, build)
    cache.get(keys[0], causal, build)
    cache.get(keys[2], causal, build)
    assert cache.stats.evictions == 1
    assert cache.stats.bytes == 2 * one.stats.bytes
    cache.get(keys[0], causal, build_again)  # still there
    misses = cache.stats.misses
    cache.get(keys[1], causal, build)
    assert cache.stats.misses == misses + 1


def test_a_mask_larger_than_the_cache_is_returned_and_not_kept():
    cache = BlockMaskCache(max_bytes=1)
    assert cache.get(KEY, causal, build).kv_num_blocks.shape == (1, 1, 2)
    assert (cache.stats.entries, cache.stats.bytes) == (0, 0)


def test_several_threads_lose_no_count():
    cache = BlockMaskCache()
    keys = [replace(KEY, layouts=(bytes([i % 4]),)) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: cache.get(key, causal, build), keys))
    assert cache.stats.hits + cache.stats.misses == 64
    assert cache.stats.entries == 4
