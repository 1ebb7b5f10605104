"""The builder equals torch's, for any mask_mod, without its memory."""

from __future__ import annotations

import functools
import gc
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.nn.attention.flex_attention import create_block_mask as torch_create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from flexmask.block_mask import DecodeRowMask, create_block_mask, explain_mask, tile_classifier
from flexmask.block_mask.intervals.evaluator import MaskEvaluator
from flexmask.block_mask.intervals.interval import exact_index
from flexmask.block_mask.tile_states import Axis
from flexmask.errors import MaskError
from mask_grammar import CallableMask, RandomMask, random_masks

aten = torch.ops.aten
MaskMod = Callable[[Any, Any, Any, Any], Any]

KV_TENSORS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
Q_TENSORS = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")


def assert_identical(
    actual: BlockMask, expected: BlockMask, *, has_q_blocks: bool = False
) -> None:
    for name in KV_TENSORS + (Q_TENSORS if has_q_blocks else ()):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride()), name
        assert torch.equal(ours, theirs), name
    assert actual.seq_lengths == expected.seq_lengths
    assert actual.BLOCK_SIZE == expected.BLOCK_SIZE


def check(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: str = "cpu",
    BLOCK_SIZE: int | tuple[int, int] = 128,
) -> None:
    ours = create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE)
    theirs = torch_create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE)
    assert_identical(ours, theirs)
    assert ours.mask_mod is mask_mod


# Random expressions.

CASES = 50_000 if os.environ.get("FLEXMASK_LONG") else 480
SHAPES_PER_MASK = 4
MAX_OFFSET, MAX_LENGTH = 40, 70

shapes = st.fixed_dictionaries(
    {
        "B": st.sampled_from([None, 1, 2, 3]),
        "H": st.sampled_from([None, 1, 3]),
        "Q_LEN": st.integers(1, MAX_LENGTH),
        "KV_LEN": st.integers(1, MAX_LENGTH),
        "BLOCK_SIZE": st.sampled_from([8, 16, (16, 32), (32, 16), (5, 7), (64, 32), 128, (1, 4)]),
    }
)
options = st.fixed_dictionaries(
    {
        "q_offset": st.sampled_from([0, 0, 16, 1, MAX_OFFSET]),
        "memory_bytes": st.sampled_from([2**28, 2**28, 2**28, 2**14]),
        "compute_q_blocks": st.booleans(),
    }
)
limits = st.fixed_dictionaries(
    {"cells": st.sampled_from([1, 16, 2**16]), "pairs": st.sampled_from([0, 2**15])}
)


@pytest.mark.timeout(7200)
@settings(
    max_examples=CASES // SHAPES_PER_MASK,
    deadline=None,
    derandomize="FLEXMASK_LONG" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(random_masks(), st.lists(st.tuples(shapes, options, limits), min_size=4, max_size=4))
def test_any_mask_gets_the_tiles_that_torch_gives_it(
    random_mask: RandomMask, variants: list[Any]
) -> None:
    check_random(random_mask, variants, "cpu")


@pytest.mark.gpu
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(random_masks(), st.lists(st.tuples(shapes, options, limits), min_size=4, max_size=4))
def test_any_mask_gets_the_tiles_that_torch_gives_it_on_cuda(
    random_mask: RandomMask, variants: list[Any]
) -> None:
    check_random(random_mask, variants, "cuda")


def check_random(random_mask: RandomMask, variants: list[Any], device: str) -> None:
    mask_mod = random_mask.mask_mod(device)
    try:
        dense = create_mask(mask_mod, 3, 3, MAX_LENGTH + MAX_OFFSET, MAX_LENGTH, device=device)
    except RuntimeError as error:
        if "ZeroDivision" not in str(error):
            raise
        return
    for shape, option, limit in variants:
        rows = dense[:, :, option["q_offset"] :]
        expected = torch_create_block_mask(_table_mask(rows), **shape, device=device)
        with (
            mock.patch.dict(tile_classifier.CELLS_AT_ONCE, {device: limit["cells"]}),
            mock.patch.dict(tile_classifier.PAIRS_AT_ONCE, {device: limit["pairs"]}),
        ):
            actual = create_block_mask(mask_mod, **shape, device=device, **option)
        assert_identical(actual, expected, has_q_blocks=option["compute_q_blocks"])


def _table_mask(allowed: Tensor) -> MaskMod:
    return lambda b, h, q, k: allowed[b, h, q, k]


# Masks as users write them.

S = 700


def segments(device: str, *lengths: int) -> Tensor:
    ids = [torch.full((length,), i) for i, length in enumerate(lengths)]
    return torch.cat(ids).to(device=device, dtype=torch.int32)


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def sliding_window(device: str) -> MaskMod:
    return lambda b, h, q, k: (q >= k) & (q - k <= 150)


def sliding_window_with_sinks(device: str) -> MaskMod:
    window, sinks = torch.tensor(97, device=device), 4
    return lambda b, h, q, k: (q >= k) & ((q - k < window) | (k < sinks))


def prefix_lm(device: str) -> MaskMod:
    prefix_lengths = torch.tensor([100, 256, 333], device=device)
    return lambda b, h, q, k: (q >= k) | (k < prefix_lengths[b])


def packed_by_ids(device: str) -> MaskMod:
    document_ids = segments(device, 100, 28, 128, 300, 144)
    return lambda b, h, q, k: (document_ids[q] == document_ids[k]) & (q >= k)


def packed_by_offsets(device: str) -> MaskMod:
    document_ids = segments(device, 100, 28, 128, 300, 144).long()
    offsets = torch.tensor([0, 100, 128, 256, 556], device=device)

    def packed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q_local = q_idx - offsets[document_ids[q_idx]]
        kv_local = kv_idx - offsets[document_ids[kv_idx]]
        is_same = document_ids[q_idx] == document_ids[kv_idx]
        return is_same & (q_local >= kv_local) & (q_local - kv_local < 64)

    return packed


def shared_prefix(device: str) -> MaskMod:
    ids = segments(device, 130, 200, 200, 170)
    return lambda b, h, q, k: (q >= k) & ((ids[k] == 0) | (ids[q] == ids[k]))


def ensemble(device: str) -> MaskMod:
    ids = torch.stack((segments(device, 1, 200, 250, 200, 49), segments(device, 60, 90, 450, 100)))
    ids = torch.nn.functional.pad(ids, (0, 324), value=-1) if ids.shape[1] == S else ids
    tail = torch.tensor([4, 3], device=device)

    def isolated(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        sees = (ids[b][q_idx] == ids[b][kv_idx]) | (ids[b, q_idx] == tail[b])
        return (q_idx >= kv_idx) & sees & (ids[b, kv_idx] >= 0)

    return isolated


def dilated_window(device: str) -> MaskMod:
    return lambda b, h, q, k: ((q - k) % 3 == 0) & (q >= k) & (q - k < 300)


def global_and_window(device: str) -> MaskMod:
    is_global = torch.zeros(S, dtype=torch.bool, device=device)
    is_global[[0, 1, 300]] = True
    return lambda b, h, q, k: is_global[q] | is_global[k] | ((q - k).abs() <= 40)


def neighbourhood_2d(device: str) -> MaskMod:
    width = 26

    def neighbourhood(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        rows = (q_idx // width - kv_idx // width).abs()
        columns = (q_idx % width - kv_idx % width).abs()
        return (rows <= 3) & (columns <= 5)

    return neighbourhood


def block_diffusion(device: str) -> MaskMod:
    half, block = S // 2, 25

    def diffusion(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q_clean, kv_clean = q_idx >= half, kv_idx >= half
        q_block = torch.where(q_clean, (q_idx - half) // block, q_idx // block)
        kv_block = torch.where(kv_clean, (kv_idx - half) // block, kv_idx // block)
        block_diagonal = (q_block == kv_block) & (q_clean == kv_clean)
        offset_causal = (q_block > kv_block) & kv_clean & ~q_clean
        block_causal = (q_block >= kv_block) & kv_clean & q_clean
        return block_diagonal | offset_causal | block_causal

    return diffusion


def tree(device: str) -> MaskMod:
    parents = [(node - 1) // 2 for node in range(60)]
    ancestors = torch.eye(60, dtype=torch.bool)
    for node in range(1, 60):
        ancestors[node] |= ancestors[parents[node]]
    ancestors = ancestors.to(device)
    first = S - 60

    def attend(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q_node, kv_node = (q_idx - first).clamp(min=0), (kv_idx - first).clamp(min=0)
        in_tree = (q_idx >= first) & ancestors[q_node, kv_node]
        return torch.where(kv_idx < first, q_idx >= kv_idx, in_tree)

    return attend


def per_head_windows(device: str) -> MaskMod:
    windows = torch.tensor([16, 64, 1000], device=device)
    return lambda b, h, q, k: (q >= k) & (q - k < windows[h])


def padded(device: str) -> MaskMod:
    starts = torch.tensor([0, 130, 600], device=device)
    stops = torch.tensor([700, 690, 640], device=device)
    return lambda b, h, q, k: (q >= k) & (k >= starts[b]) & (k < stops[b])


def dense_table(device: str) -> MaskMod:
    allowed = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    allowed[200:500, 17:200] = False
    return lambda b, h, q, k: allowed[q, k]


FAMILIES: list[Callable[[str], MaskMod]] = [
    lambda device: causal,
    sliding_window,
    sliding_window_with_sinks,
    prefix_lm,
    packed_by_ids,
    packed_by_offsets,
    shared_prefix,
    ensemble,
    dilated_window,
    global_and_window,
    neighbourhood_2d,
    block_diffusion,
    tree,
    per_head_windows,
    padded,
    dense_table,
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.strip("<>"))
@pytest.mark.parametrize("tile", [128, (256, 128), (64, 128), 100], ids=str)
def test_families_equal_torch(
    family: Callable[[str], MaskMod], tile: int | tuple[int, int], device: str
) -> None:
    mask_mod = family(device)
    B = 2 if family is ensemble else 3
    check(mask_mod, B, 3, S, S, device, tile)
    check(mask_mod, B, None, S - 60, S, device, tile)
    check(mask_mod, None, None, 129, S - 128, device, tile)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.strip("<>"))
def test_families_never_need_vmap(family: Callable[[str], MaskMod]) -> None:
    with mock.patch("torch.vmap", side_effect=AssertionError("a rule is missing")):
        create_block_mask(family("cpu"), 2, 3, S, S, "cpu")


def test_large_masks_are_decided_by_coarse_cells() -> None:
    ids = segments("cpu", 500, 3000, 4000, 1500, 1000)

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & ((ids[q] == ids[k]) | (ids[k] == 0))

    with mock.patch.dict(tile_classifier.CELLS_AT_ONCE, cpu=40):
        check(mask_mod, None, None, 10_000, 9_000, BLOCK_SIZE=128)
        check(mask_mod, None, None, 2_100, 3_000, BLOCK_SIZE=(16, 64))


# Forms of a mask_mod.


def test_partials_objects_and_methods_are_masks() -> None:
    def window(b: Any, h: Any, q: Any, k: Any, *, size: int) -> Any:
        return (q - k).abs() < size

    check(functools.partial(window, size=50), 1, 1, 300, 300)
    check(CallableMask(causal), 1, 1, 300, 300)

    # torch counts the arguments of a method wrongly and refuses it.
    method = create_block_mask(CallableMask(causal).__call__, 1, 1, 300, 300, "cpu")
    assert_identical(method, torch_create_block_mask(causal, 1, 1, 300, 300, "cpu"))


def test_masks_that_are_constant(device: str) -> None:
    def everything(b: Any, h: Any, q: Any, k: Any) -> Any:
        return b.new_ones((), dtype=torch.bool)

    def nothing(b: Any, h: Any, q: Any, k: Any) -> Any:
        return torch.zeros((), dtype=torch.bool, device=device)

    for mask_mod in (everything, nothing):
        check(mask_mod, 2, 3, 300, 257, device)


def test_numpy_numbers_are_numbers() -> None:
    window = np.int64(70)
    check(lambda b, h, q, k: (q >= k) & (q - k < window), 1, 1, 300, 300)
    report = explain_mask(lambda b, h, q, k: q >= k + window, 1, 1, 3000, 3000, "cpu")
    assert report.decided_by_intervals > report.decided_by_evaluation


def test_an_operation_without_a_rule_is_evaluated_exactly() -> None:
    def coprime(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (torch.gcd(q, k) <= 1) & (q >= k)

    check(coprime, 2, None, 300, 290, BLOCK_SIZE=64)
    report = explain_mask(coprime, None, None, 300, 290, "cpu", 64)
    assert report.decided_by_evaluation >= report.tiles_partial
    assert report.decided_by_intervals > 0


def test_a_mask_that_intervals_cannot_follow_is_evaluated_exactly() -> None:
    table = torch.rand(300, 2, generator=torch.Generator().manual_seed(0)) > 0.3

    def stacked(b: Any, h: Any, q: Any, k: Any) -> Any:
        pair = torch.stack((q, k))
        return table[pair[0], 0] & table[pair[1], 1]

    check(stacked, 1, 2, 300, 290, BLOCK_SIZE=32)


def test_what_does_not_depend_on_a_head_is_computed_once() -> None:
    seen: list[int] = []

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen.append((q.lo - k.lo).numel())
        return q >= k

    check_mask = create_block_mask(mask_mod, 8, 32, 1024, 1024, "cpu")
    assert check_mask.kv_indices.shape == (8, 32, 8, 8)
    assert max(seen) <= 8 * 16
    check(causal, 8, 32, 300, 300)


class CountedOperations(TorchDispatchMode):
    """Counts what is dispatched, views aside, as a measure of the time that a GPU's host takes."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.launches += not is_view
        self.waits += func in (aten.nonzero.default, aten._local_scalar_dense.default)
        return result


def test_a_small_mask_takes_few_operations_and_one_wait() -> None:
    ids = segments("cpu", 10, 30, 40, 50, 60, 66)
    limits = {"cpu": tile_classifier.PAIRS_AT_ONCE["cuda"]}

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        q_segment, kv_segment = ids[q], ids[k]
        sees = (kv_segment == 0) | (q_segment == kv_segment) | (q_segment == 5)
        return (q >= k) & sees

    with mock.patch.dict(tile_classifier.PAIRS_AT_ONCE, limits), CountedOperations() as counted:
        create_block_mask(mask_mod, None, None, 256, 256, "cpu", BLOCK_SIZE=16)
    assert counted.waits == 1
    assert counted.launches <= 52


def test_a_build_leaves_nothing_to_the_garbage_collector() -> None:
    """Tensors in reference cycles would keep their memory for a while."""
    mask_mod = shared_prefix("cpu")
    create_block_mask(mask_mod, 1, 1, S, S, "cpu")
    gc.collect()
    gc.disable()
    try:
        create_block_mask(mask_mod, 1, 1, S, S, "cpu")
        assert gc.collect() == 0
    finally:
        gc.enable()


# Options.


@pytest.mark.parametrize("q_offset", [0, 1, 64, 128, 513])
def test_a_query_offset_is_in_the_tiles_and_in_the_mask_mod(q_offset: int, device: str) -> None:
    ids = segments(device, 300, 400, 300)

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (ids[q] == ids[k])

    def shifted(b: Any, h: Any, q: Any, k: Any) -> Any:
        return mask_mod(b, h, q + q_offset, k)

    ours = create_block_mask(mask_mod, 1, 1, 200, 713, device, q_offset=q_offset)
    assert_identical(ours, torch_create_block_mask(shifted, 1, 1, 200, 713, device))
    dense = create_mask(ours.mask_mod, 1, 1, 200, 713, device)
    assert torch.equal(dense, create_mask(shifted, 1, 1, 200, 713, device))


def test_query_blocks_are_listed_on_request(device: str) -> None:
    mask_mod = per_head_windows(device)
    theirs = torch_create_block_mask(mask_mod, 2, 3, 500, 700, device)
    ours = create_block_mask(mask_mod, 2, 3, 500, 700, device, compute_q_blocks=True)
    assert_identical(ours, theirs, has_q_blocks=True)
    assert create_block_mask(mask_mod, 2, 3, 500, 700, device).q_indices is None


def test_little_memory_changes_nothing() -> None:
    mask_mod = neighbourhood_2d("cpu")
    expected = torch_create_block_mask(mask_mod, 1, 1, 300, 300, "cpu", 32)
    for memory_bytes in (1, 2**16):
        ours = create_block_mask(mask_mod, 1, 1, 300, 300, "cpu", 32, memory_bytes=memory_bytes)
        assert_identical(ours, expected)


MEMORY_PROGRAM = """
import resource, torch
from flexmask.block_mask import create_block_mask

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def mask_mod(b, h, q, k):
    return torch.gcd(q, k) >= 0

create_block_mask(mask_mod, 1, 1, 256, 256, "cpu", memory_bytes=2**25)
before = peak_bytes()
create_block_mask(mask_mod, 1, 1, 4096, 4096, "cpu", memory_bytes=2**25)
print(peak_bytes() - before)
"""


def test_evaluation_stays_within_its_memory() -> None:
    """4096² pairs would take 128 MiB for one int64 intermediate; the bound is 32 MiB."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 1.5 * 2**25


def test_tensors_start_where_compiled_kernels_want_them() -> None:
    """Compiled kernels copy inputs that are not aligned to 16 bytes, at every call."""
    built = create_block_mask(causal, 1, 3, 300, 300, "cpu", compute_q_blocks=True)
    rows = DecodeRowMask(causal, 1, 300, "cpu").block_mask
    for block_mask, names in ((built, KV_TENSORS + Q_TENSORS), (rows, KV_TENSORS)):
        tensors = [getattr(block_mask, name) for name in names]
        assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in tensors)


def test_flex_attention_gives_the_same_with_either_mask() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    mask_mod = shared_prefix("cpu")
    ours = create_block_mask(mask_mod, 1, None, 300, 300, "cpu")
    theirs = torch_create_block_mask(mask_mod, 1, None, 300, 300, "cpu")
    query, key, value = torch.randn(3, 1, 2, 300, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [flex_attention(query, key, value, block_mask=m) for m in (ours, theirs)]
    assert torch.equal(*outputs)


# Rows of captured tensors.

short = torch.arange(100)
rows_of_ids = torch.stack((torch.arange(300) // 60, torch.arange(300) // 45))
pairs_of_ends = torch.tensor([[0, 100], [50, 300]])
kept = torch.tensor([[[0, 2], [1, 4], [0, 3], [2, 3], [4, 1]]]).expand(2, 2, 5, 2).contiguous()
three = torch.tensor([[7, 90, 200], [30, 31, 299]])


def in_order(pair: Any, k: Any) -> Any:
    start, end = pair
    return (k >= start) & (k < end)


def first_and_last(values: Any, q: Any, k: Any) -> Any:
    first, *others = values
    return (k >= first) | (q < others[-1])


def before_any(values: Any, q: Any, k: Any) -> Any:
    allowed = q >= k
    for value in values:
        allowed = allowed | (k < value)
    return allowed


ROWS_WITH_RULES: dict[str, MaskMod] = {
    "unpacked": lambda b, h, q, k: in_order(pairs_of_ends[b], k),
    "unpacked with a star": lambda b, h, q, k: first_and_last(three[b], q, k),
    "iterated": lambda b, h, q, k: before_any(three[b], q, k),
    "listed": lambda b, h, q, k: in_order(list(pairs_of_ends[b]), k),
    "enumerated": lambda b, h, q, k: dict(enumerate(three[b]))[1] > k,
    "unbound": lambda b, h, q, k: in_order(pairs_of_ends[b].unbind(), k),
    "unbound by torch": lambda b, h, q, k: in_order(torch.unbind(pairs_of_ends[b]), k),
    "rows of rows": lambda b, h, q, k: in_order(next(iter(kept[b]))[q // 64], k // 64),
    "last entry": lambda b, h, q, k: pairs_of_ends[b][-1] > k,
    "cast": lambda b, h, q, k: rows_of_ids.int()[b].long()[q] == rows_of_ids[b][k],
    "cast twice": lambda b, h, q, k: pairs_of_ends[b].bool().long()[0] <= k,
    "cast to another's dtype": lambda b, h, q, k: rows_of_ids[b].to(q)[q] >= k // 60,
    "cast and unpacked": lambda b, h, q, k: in_order(pairs_of_ends[b].float(), k),
    "shape": lambda b, h, q, k: q + k < rows_of_ids[b].shape[0],
    "size": lambda b, h, q, k: q + k < rows_of_ids[b].size(-1) - len(rows_of_ids[b]) // 3,
    "dim": lambda b, h, q, k: q + k < kept[b].dim() * 100 + kept[b, h].ndim,
    "numel": lambda b, h, q, k: (q >= k) if kept[b].numel() == 20 else (q < k),
    "dtype": lambda b, h, q, k: (q < k) if kept[b].is_floating_point() else (q >= k),
    "index of numpy": lambda b, h, q, k: rows_of_ids[np.int64(1)][q] == rows_of_ids[b][k],
    "numpy first": lambda b, h, q, k: np.int64(70) <= q - k,
}

ROWS_WITHOUT_RULES: dict[str, MaskMod] = {
    "view": lambda b, h, q, k: rows_of_ids[b].view(-1)[q] == rows_of_ids[b][k],
    "reshape": lambda b, h, q, k: rows_of_ids[b].reshape(5, 60)[q // 60, q % 60] == k // 60,
    "flip": lambda b, h, q, k: rows_of_ids[b].flip(0)[q] == rows_of_ids[b][k],
    "slice": lambda b, h, q, k: rows_of_ids[b, ::2][q // 2] == rows_of_ids[b][k],
    "new dimension": lambda b, h, q, k: rows_of_ids[b][None, q][0] == rows_of_ids[b][k],
    "arithmetic": lambda b, h, q, k: (rows_of_ids[b] + 1)[q] == rows_of_ids[b][k],
    "comparison": lambda b, h, q, k: (rows_of_ids[b] == 3)[q] | (q >= k),
    "two rows": lambda b, h, q, k: torch.maximum(rows_of_ids[b], rows_of_ids[h])[q] >= k // 50,
    "where": lambda b, h, q, k: torch.where(q > k, rows_of_ids[b], 0)[q] == rows_of_ids[b][k],
    "gather": lambda b, h, q, k: rows_of_ids.gather(1, q.expand(2, 1))[b, 0] == k // 60,
    "take": lambda b, h, q, k: torch.take(rows_of_ids[b], q) == rows_of_ids[b][k],
    "split": lambda b, h, q, k: pairs_of_ends[b].split(1)[1][0] > k,
    "table by a row": lambda b, h, q, k: short[pairs_of_ends[b].clamp(max=99)][1] <= k,
    "list of an index": lambda b, h, q, k: short[[q // 3]] >= k,
    "any over the own dimension": lambda b, h, q, k: (kept[b, h, q // 64] == k // 64).any(-1),
    "any beside another condition": lambda b, h, q, k: (
        (q >= k) & (kept[b, h, q // 64] == k // 64).any(-1)
    ),
    "torch.any": lambda b, h, q, k: torch.any(kept[b, h, q // 64] == k // 64, dim=-1),
    "all": lambda b, h, q, k: (kept[b, h, q // 64] <= k // 64).all(),
    "sum": lambda b, h, q, k: (kept[b, h, q // 64] == k // 64).sum(-1) > 0,
    "amin": lambda b, h, q, k: (kept[b, h, q // 64] - k // 64).abs().amin(-1) < 1,
    "amax": lambda b, h, q, k: (kept[b, h, q // 64] - k // 64).abs().amax() < 2,
    "values of min": lambda b, h, q, k: (kept[b, h, q // 64] - k // 64).abs().min(-1).values < 1,
    "indices of max": lambda b, h, q, k: kept[b, h, q // 64].max(dim=-1)[1] == k // 64,
    "argmax": lambda b, h, q, k: kept[b, h, q // 64].argmax() == k // 64,
    "sort": lambda b, h, q, k: kept[b, h, q // 64].sort().values[1] == k // 64,
    "mean": lambda b, h, q, k: kept[b, h, q // 64].float().mean() < k / 64,
    "sum in Python": lambda b, h, q, k: sum(pairs_of_ends[b] + 1) - 200 <= k,
    "isin": lambda b, h, q, k: torch.isin(k // 64, kept[b, h, q // 64]),
    "searchsorted": lambda b, h, q, k: torch.searchsorted(three[b], q) >= k // 60,
    "whole table": lambda b, h, q, k: (short == q).any() & (k < short.max()),
    "stack of comparisons": lambda b, h, q, k: torch.stack((q >= k, k < 10)).any(0),
    "all of a stack": lambda b, h, q, k: torch.stack([q >= k, k > 10]).all(),
    "rows of all batch rows": lambda b, h, q, k: (rows_of_ids[:, q] == rows_of_ids[:, k]).all(),
    "matrix product": lambda b, h, q, k: (kept[b, h, 0] @ kept[b, h, 1]) * 20 > q + k,
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch.vmap warns of what it does slowly
@pytest.mark.parametrize("name", [*ROWS_WITH_RULES, *ROWS_WITHOUT_RULES])
def test_what_is_asked_of_a_row_of_a_table_is_as_in_torch(name: str) -> None:
    mask_mod = (ROWS_WITH_RULES | ROWS_WITHOUT_RULES)[name]
    check(mask_mod, 2, 2, 140, 130, BLOCK_SIZE=64)


@pytest.mark.parametrize("name", ROWS_WITH_RULES)
def test_entries_casts_and_shapes_of_rows_need_no_vmap(name: str) -> None:
    with mock.patch("torch.vmap", side_effect=AssertionError("a rule is missing")):
        create_block_mask(ROWS_WITH_RULES[name], 2, 2, 300, 290, "cpu", 64)


def test_conditions_beside_a_reduction_still_decide_tiles() -> None:
    mask_mod = ROWS_WITHOUT_RULES["any beside another condition"]
    report = explain_mask(mask_mod, 2, 2, 300, 300, "cpu", 32)
    above_the_diagonal = 2 * 2 * 10 * 9 // 2
    assert report.decided_by_intervals >= above_the_diagonal


def test_a_table_made_anew_at_each_call_is_not_kept() -> None:
    made = []

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        table = torch.arange(300) * 1
        made.append(weakref.ref(table))
        return table[q] >= table[k]

    check(mask_mod, None, None, 300, 300, BLOCK_SIZE=16)
    evaluator = MaskEvaluator(mask_mod, torch.device("cpu"))
    axis = Axis(0, 300, 16)
    zero = exact_index(torch.zeros(1, 1, 1, 1, dtype=torch.int64), 1, evaluator)
    for _ in range(3):
        cells = (axis.all_cells(torch.arange(400), 16, dim, evaluator) for dim in (2, 3))
        evaluator.interval_ends(zero, zero, *cells)
    gc.collect()
    assert [ref for ref in made if ref() is not None] == []


RARE = [torch.uint16, torch.uint32, torch.uint64, torch.complex64]
RARE += [torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.bfloat16]


@pytest.mark.parametrize("dtype", RARE, ids=str)
def test_tables_of_rare_dtypes_are_exact(dtype: torch.dtype) -> None:
    values = (torch.arange(300) // 60).to(dtype)
    as_floats = torch.float32 if not dtype.is_complex else torch.complex64
    check(lambda b, h, q, k: values[q] == values[k], 1, 1, 300, 290, BLOCK_SIZE=64)
    check(lambda b, h, q, k: (values[q] != values[k]) & (q >= k), 1, 1, 300, 290, BLOCK_SIZE=64)
    check(lambda b, h, q, k: values[q].to(as_floats) == values[k].to(as_floats), 1, 1, 300, 290)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.float8_e5m2], ids=str)
def test_tables_of_dtypes_with_an_order_are_bounded_by_intervals(dtype: torch.dtype) -> None:
    values = (torch.arange(3000) // 600).to(dtype)
    mask_mod = lambda b, h, q, k: values[q].to(torch.int32) == values[k].to(torch.int32)  # noqa: E731
    report = explain_mask(mask_mod, 1, 1, 3000, 3000, "cpu")
    assert report.decided_by_intervals > report.decided_by_evaluation


REDUCTION_PROGRAM = """
import resource, torch
from flexmask.block_mask import create_block_mask

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

kept = torch.arange(32 * 32).view(32, 32)

def mask_mod(b, h, q, k):
    return (kept[q // 64] * 0 <= k).all(-1)

create_block_mask(mask_mod, 1, 1, 128, 128, "cpu", memory_bytes=2**24)
before = peak_bytes()
create_block_mask(mask_mod, 1, 1, 2048, 2048, "cpu", memory_bytes=2**24)
print(peak_bytes() - before)
"""


def test_reductions_stay_within_the_memory_too() -> None:
    """Without regard to the 32 entries of a row, 128 MiB would be taken of 16."""
    run = subprocess.run(
        [sys.executable, "-c", REDUCTION_PROGRAM], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 2 * 2**24


REDUCTIONS = [
    "any over the own dimension",
    "torch.any",
    "sum",
    "values of min",
    "argmax",
    "sort",
    "isin",
    "searchsorted",
    "whole table",
    "all of a stack",
    "matrix product",
]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_refused_where_attention_must_compile_the_mask(name: str) -> None:
    mask_mod = ROWS_WITHOUT_RULES[name]
    message = "a reduction, which FlexAttention cannot compile.* must be pointwise"
    with pytest.raises(MaskError, match=message):
        create_block_mask(mask_mod, 2, 2, 300, 300, "cpu", pointwise_only=True)
    with pytest.raises(MaskError, match=message):
        explain_mask(mask_mod, 2, 2, 300, 300, "cpu", pointwise_only=True)
    with pytest.raises(MaskError, match=message):
        DecodeRowMask(mask_mod, 2, 300, "cpu")


def test_larger_of_two_is_pointwise() -> None:
    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return torch.max(q, k) + q.min(k) < 300

    create_block_mask(mask_mod, 1, 1, 300, 300, "cpu", pointwise_only=True)


# Inside of torch.compile.


def attended(x: Tensor) -> Tensor:
    built = create_block_mask(causal, None, None, 256, 256, "cpu")
    return x + built.kv_num_blocks.sum()


def test_a_full_graph_that_builds_a_mask_is_refused_in_one_line() -> None:
    compiled = torch.compile(attended, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError) as caught:
        compiled(torch.zeros(2))
    assert str(caught.value).splitlines()[0] == (
        "a BlockMask cannot be built inside a compiled graph, because building looks at values; "
        "build it before the compiled function and pass it in"
    )


def test_between_two_graphs_a_mask_is_built() -> None:
    compiled = torch.compile(attended, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), attended(torch.zeros(2)))


def test_a_mask_is_passed_into_a_full_graph() -> None:
    built = create_block_mask(causal, None, None, 256, 256, "cpu")
    compiled = torch.compile(lambda m: m.kv_num_blocks + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(built), built.kv_num_blocks + 1)


# Illegal masks.

four = torch.tensor(4)


def _if(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k if q > 3 else k == 0


ILLEGAL: dict[str, tuple[Callable[..., Any], str]] = {
    "Python bool": (lambda b, h, q, k: True, "returns the Python bool True.*`q_idx >= 0`"),
    "if": (_if, "reads a value on the host: `if`.*torch.where"),
    "and": (lambda b, h, q, k: (q > k) and (k > 3), "reads a value on the host.*`&`"),
    "item": (lambda b, h, q, k: q >= k.item(), r"reads a value on the host: item\(\)"),
    "item of a capture": (lambda b, h, q, k: q >= four.item(), r"item\(\)"),
    "if on a capture": (lambda b, h, q, k: q >= k if four > 3 else q < k, "__bool__"),
    "int": (lambda b, h, q, k: q >= int(k), r"int\(\) of a tensor"),
    "list": (lambda b, h, q, k: q >= [1, 2][k], "a tensor as Python index"),
    "in": (lambda b, h, q, k: (q in short) & (q >= k), "reads a value on the host"),
    "in a row": (lambda b, h, q, k: k in pairs_of_ends[b], "reads a value on the host: `in`"),
    "list of a row": (lambda b, h, q, k: k >= pairs_of_ends[b].tolist()[0], r"tolist\(\)"),
    "if on a row": (lambda b, h, q, k: q >= k if (kept[b] > 3).any() else q < k, "`if`"),
    "random": (lambda b, h, q, k: torch.rand(()) > 0.5, "random numbers with rand.*draw them"),
    "byte index": (lambda b, h, q, k: short[q.byte()] == k, r"with torch.uint8.*`index.long\(\)`"),
    "too many": (lambda b, h, q, k: pairs_of_ends[b][2] > k, "with 2 to 2 in dimension 1"),
    "integer": (lambda b, h, q, k: q - k, r"returns torch.int64; it must return torch.bool"),
    "None": (lambda b, h, q, k: None, "returns NoneType"),
    "row computed": (lambda b, h, q, k: kept[b, h, 0] + 1 == q, "index captured tensors in all"),
    "row": (lambda b, h, q, k: short.view(10, 10)[b] >= 0, "index captured tensors in all"),
    "part": (lambda b, h, q, k: short.view(10, 10)[b], "part of a captured tensor; index all"),
    "short": (lambda b, h, q, k: short[q] == k, r"tensor 'short' of shape \(100,\) with 0 to 299"),
    "short, computed": (
        lambda b, h, q, k: torch.where(q < 100, short[q * 1], 0) == k,
        r"'short' of shape \(100,\) out of range; clamp",
    ),
    "short, a row computed": (
        lambda b, h, q, k: (short.view(2, 50)[b] + 1)[q] == k,
        r"a tensor of shape \(50,\) with 0 to 299",
    ),
    "short, without rule": (lambda b, h, q, k: short[torch.gcd(q, q)] == k, "out of range"),
    "signature": (lambda b, h, q: q > 0, r"must take \(b, h, q_idx, kv_idx\)"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_masks_are_named_with_the_rule_and_the_fix(name: str) -> None:
    mask_mod, message = ILLEGAL[name]
    with pytest.raises(MaskError, match=message) as caught:
        create_block_mask(mask_mod, 1, 1, 300, 300, "cpu")
    assert "mask_mod '" in str(caught.value)
    assert "test_block_mask.py:" in str(caught.value)


@pytest.mark.parametrize("name", ["Python bool", "if", "item", "integer", "row"])
def test_illegal_masks_are_found_behind_operations_without_a_rule(name: str) -> None:
    illegal, _ = ILLEGAL[name]

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        q = torch.stack((q, k))[0]
        return illegal(b, h, q, k)

    with pytest.raises(MaskError):
        create_block_mask(mask_mod, 1, 1, 300, 300, "cpu")


def test_a_users_own_error_is_raised_as_it_is() -> None:
    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k + [][0]

    with pytest.raises(IndexError, match="list index out of range"):
        create_block_mask(mask_mod, 1, 1, 300, 300, "cpu")


def test_a_type_error_in_a_mask_is_raised_as_it_is() -> None:
    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k + "3"

    with pytest.raises(TypeError):
        create_block_mask(mask_mod, 1, 1, 300, 300, "cpu")


def test_a_torch_built_for_cuda_builds_masks_without_a_gpu(monkeypatch: Any) -> None:
    def current_accelerator(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 256, 256)
    assert mask.kv_indices.device.type == "cpu"


@pytest.mark.gpu
def test_a_captured_tensor_on_another_device_is_named() -> None:
    ids = segments("cpu", 300)
    with pytest.raises(
        MaskError, match=r"captures tensor 'ids' of shape .* on cpu.*built on cuda:0"
    ):
        create_block_mask(lambda b, h, q, k: ids[q] == ids[k], 1, 1, 300, 300, "cuda")


def test_a_captured_tensor_on_the_meta_device_is_named() -> None:
    ids = torch.zeros(300, device="meta")
    with pytest.raises(MaskError, match=r"captures tensor 'ids' of shape .* on meta"):
        create_block_mask(lambda b, h, q, k: ids[q] == 0, 1, 1, 300, 300, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Q_LEN": 0}, "Q_LEN must be positive, got 0"),
        ({"B": -1}, "B must be positive, got -1"),
        ({"BLOCK_SIZE": (128, 0)}, "BLOCK_SIZE must be positive, got 0"),
        ({"q_offset": -3}, "q_offset must not be negative, got -3"),
        ({"memory_bytes": 0}, "memory_bytes must be positive, got 0"),
    ],
)
def test_sizes_are_checked(change: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"B": 1, "H": 1, "Q_LEN": 10, "KV_LEN": 10, "device": "cpu"}
    with pytest.raises(MaskError, match=message):
        create_block_mask(causal, **(sizes | change))


# Reports.


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.strip("<>"))
def test_a_report_counts_tiles_and_pairs(family: Callable[[str], MaskMod]) -> None:
    mask_mod = family("cpu")
    report = explain_mask(mask_mod, 2, 3, 650, 690, "cpu", (64, 100))
    theirs = torch_create_block_mask(mask_mod, 2, 3, 650, 690, "cpu", (64, 100))
    dense = create_mask(mask_mod, 2, 3, 650, 690, device="cpu")
    assert_identical(report.block_mask, theirs)
    assert report.tiles_partial == theirs.kv_num_blocks.sum()
    assert theirs.full_kv_num_blocks is not None
    assert report.tiles_full == theirs.full_kv_num_blocks.sum()
    tiles = 2 * 3 * 11 * 7
    assert report.tiles_empty == tiles - report.tiles_partial - report.tiles_full
    assert report.allowed_pairs == dense.sum()
    assert report.density == pytest.approx(dense.float().mean().item())
    assert report.decided_by_intervals + report.decided_by_evaluation == tiles
    assert report.block_mask_bytes == 4 * (2 * tiles + 2 * 2 * 3 * 11)
    assert report.states.shape == report.decided.shape == (2, 3, 11, 7)
    assert report.build_ms > 0


# Decode rows.


def reference_rows(mask_mod: MaskMod, slots: list[int], KV_LEN: int, tile: int) -> list[Any]:
    """Partial and full tiles of each row, from the dense mask."""
    dense = create_mask(mask_mod, len(slots), 1, KV_LEN, KV_LEN, device="cpu")
    rows = []
    for b, slot in enumerate(slots):
        sees = dense[b, 0, slot] & (torch.arange(KV_LEN) <= slot)
        tiles = sees.split(tile)
        full = [i for i, x in enumerate(tiles) if len(x) == tile and x.all()]
        partial = [i for i, x in enumerate(tiles) if x.any() and i not in full]
        rows.append((partial, full))
    return rows


def listed_rows(block_mask: BlockMask) -> list[Any]:
    def lists(counts: Any, indices: Any) -> list[Any]:
        rows = zip(counts.flatten().tolist(), indices[:, 0, 0].tolist(), strict=True)
        return [row[:count] for count, row in rows]

    partial = lists(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = lists(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return list(zip(partial, full, strict=True))


SLOTS = [[0, 0, 0], [5, 130, 699], [127, 128, 129], [640, 3, 256]]


@pytest.mark.parametrize(
    "family",
    [f for f in FAMILIES if f not in (ensemble, per_head_windows)],
    ids=lambda f: f.__name__.strip("<>"),
)
def test_decode_rows_follow_their_slots(family: Callable[[str], MaskMod], device: str) -> None:
    mask_mod = family(device)
    rows = DecodeRowMask(mask_mod, 3, S, device, 64)
    tensors = [getattr(rows.block_mask, name) for name in KV_TENSORS]
    addresses = [x.data_ptr() for x in tensors]
    for slots in SLOTS:
        rows.update(torch.tensor(slots, dtype=torch.int32, device=device))
        assert listed_rows(rows.block_mask) == reference_rows(family("cpu"), slots, S, 64)
    assert [getattr(rows.block_mask, name).data_ptr() for name in KV_TENSORS] == addresses
    assert rows.block_mask.shape == (3, 1, 1, S)


def test_the_mask_mod_of_decode_rows_reads_their_slots() -> None:
    ids = segments("cpu", 300, 400)
    rows = DecodeRowMask(lambda b, h, q, k: ids[q] == ids[k], 2, S, "cpu")
    rows.update(torch.tensor([299, 450]))
    dense = create_mask(rows.block_mask.mask_mod, 2, 1, 1, S, device="cpu")[:, 0, 0]
    keys = torch.arange(S)
    assert torch.equal(dense[0], keys < 300)
    assert torch.equal(dense[1], (keys >= 300) & (keys <= 450))


def test_decode_rows_see_what_buffers_hold_at_the_update() -> None:
    ids = torch.zeros(S, dtype=torch.int32)
    rows = DecodeRowMask(lambda b, h, q, k: ids[k] == 1, 1, S, "cpu", 64)
    rows.update(torch.tensor([S - 1]))
    assert listed_rows(rows.block_mask) == [([], [])]
    ids[100:300] = 1
    rows.update(torch.tensor([S - 1]))
    assert listed_rows(rows.block_mask) == [([1, 4], [2, 3])]


def test_decode_rows_refuse_illegal_masks() -> None:
    with pytest.raises(MaskError, match="Python bool"):
        DecodeRowMask(lambda b, h, q, k: True, 1, S, "cpu")  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="depends on the head"):
        DecodeRowMask(per_head_windows("cpu"), 1, S, "cpu")
    with pytest.raises(MaskError, match=r"'short' of shape \(100,\) with 0 to 699"):
        DecodeRowMask(lambda b, h, q, k: short[k] > 3, 1, S, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [False, True])
def test_decode_rows_update_inside_a_cuda_graph(compiles: bool) -> None:
    mask_mod = packed_by_offsets("cuda")
    rows = DecodeRowMask(mask_mod, 3, S, "cuda", 64, compiles=compiles)
    q_idx = torch.zeros(3, dtype=torch.int64, device="cuda")
    rows.update(q_idx)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows.update(q_idx)
    for slots in SLOTS:
        q_idx.copy_(torch.tensor(slots))
        graph.replay()
        assert listed_rows(rows.block_mask) == reference_rows(
            packed_by_offsets("cpu"), slots, S, 64
        )


# The document.

ROOT = Path(__file__).parents[1]


def test_the_python_of_the_document_runs() -> None:
    text = (ROOT / "docs" / "block-masks.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(code, {})


def test_the_picture_is_what_its_program_draws(tmp_path: Path) -> None:
    program = ROOT / "benchmarks" / "block_mask_picture.py"
    subprocess.run([sys.executable, program, tmp_path / "picture.svg"], check=True)
    drawn = (tmp_path / "picture.svg").read_text()
    assert drawn == (ROOT / "docs" / "block-masks.svg").read_text()
    text = (ROOT / "docs" / "block-masks.md").read_text()
    assert "Of 576 tiles, 506 need no pair, 63 need 16 pairs" in text
    assert "decided by intervals over the whole tile: 506" in drawn
    assert "by 4 × 4 of its pairs: 63" in drawn
