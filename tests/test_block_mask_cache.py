from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from flexmask.block_mask.cache import BlockMaskCache, BlockMaskKey, TileIndices
from flexmask_strategies.causal import Causal
from flexmask_strategies.prefix_segment import PrefixSegment

KEY = BlockMaskKey(Causal(), b"one", None, b"slots", (128, 128))
TILES = TileIndices(*(torch.ones(size, dtype=torch.int32) for size in (2, (2, 2), 2, (2, 2))))


def test_tiles_are_found_once_they_are_kept():
    cache = BlockMaskCache()
    assert cache.find(KEY) is None
    cache.keep(KEY, TILES)
    assert cache.find(KEY) is TILES
    assert (cache.stats.hits, cache.stats.misses) == (1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"strategy": PrefixSegment()},
        {"strategy": Causal(), "layout": b"two"},
        {"window": 64},
        {"queries": b"others"},
        {"tile": (64, 64)},
    ],
    ids=lambda change: list(change)[-1],
)
def test_every_part_of_the_key_makes_another_mask(change: dict[str, Any]):
    cache = BlockMaskCache()
    cache.keep(KEY, TILES)
    assert cache.find(replace(KEY, **change)) is None


def test_parameters_of_a_strategy_make_another_mask():
    cache = BlockMaskCache()
    cache.keep(replace(KEY, strategy=PrefixSegment()), TILES)
    assert cache.find(replace(KEY, strategy=PrefixSegment(positions="sequential"))) is None


def test_the_tiles_used_longest_ago_leave_when_bytes_run_out():
    cache = BlockMaskCache(max_bytes=2 * TILES.nbytes)
    first, second, third = (replace(KEY, layout=name) for name in (b"a", b"b", b"c"))
    cache.keep(first, TILES)
    cache.keep(second, TILES)
    cache.find(first)
    cache.keep(third, TILES)
    assert (cache.stats.evictions, cache.stats.bytes) == (1, 2 * TILES.nbytes)
    assert cache.find(first) is TILES
    assert cache.find(second) is None


def test_tiles_larger_than_the_cache_are_not_kept():
    cache = BlockMaskCache(max_bytes=1)
    cache.keep(KEY, TILES)
    assert (cache.stats.entries, cache.stats.bytes) == (0, 0)


def test_several_threads_lose_no_count():
    cache = BlockMaskCache()
    keys = [replace(KEY, layout=bytes([i % 4])) for i in range(64)]

    def use(key):
        if cache.find(key) is None:
            cache.keep(key, TILES)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, keys))
    assert cache.stats.hits + cache.stats.misses == 64
    assert (cache.stats.entries, cache.stats.bytes) == (4, 4 * TILES.nbytes)
