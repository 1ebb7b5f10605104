"""The decode step's kernels against plain tensor operations, and what they take the place of."""

import itertools

import pytest
import torch
from torch.utils._pytree import tree_map_only

from flexmask.block_mask.equality import rows_are_causal
from flexmask.engine.fused_projections import fuse_projections
from flexmask.kernels.decode_attention import decode_attention, num_splits
from flexmask.kernels.launch import power_of_two
from flexmask.kernels.projection import ACTIVATIONS, fit_tiles, launch_blocks, project
from flexmask.mask_mods import causal
from oracles import CONFIGS, make_model

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
HEADS = [(6, 2, 16), (24, 8, 128), (4, 4, 96), (8, 1, 256)]
ROWS = [([639], 640), ([0], 4224), ([5, 700, 1151], 1152), (list(range(100, 140)), 256)]


def relative_error(got, want):
    assert got.shape == want.shape
    assert not got.isnan().any()
    return float((got.float() - want.float()).norm() / want.float().norm())


def random_tensors(shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) / shape[-1] ** 0.25 for shape in shapes]
    return [tensor.to(dtype) for tensor in tensors]


def moved(arguments, target):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(target), arguments)


PROJECTIONS = [
    (sizes, activation, *extras)
    for sizes, activation in (
        *itertools.product([(64, 64), (96, 32, 32), (200,)], [""]),
        *itertools.product([(64, 64), (200, 200)], ACTIVATIONS[1:]),
    )
    for extras in ((False, False, False), (True, True, True), (False, True, False))
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("width", [48, 1536])
def test_projections_equal_plain_products(rows, width, dtype):
    for sizes, activation, has_bias, has_norm, has_residual in PROJECTIONS:
        outputs = sizes[0] if activation else sum(sizes)
        x, norm, residual = random_tensors([(rows, width), (width,), (rows, outputs)], dtype)
        weights = random_tensors([(size, width) for size in sizes], dtype)
        biases = random_tensors([(size,) for size in sizes], dtype) if has_bias else []
        norm, residual = norm if has_norm else None, residual if has_residual else None
        arguments = (x, weights, biases, norm, 1e-5, activation, residual)
        got = project(*moved(arguments, "cuda")).cpu()
        assert relative_error(got, project(*moved(arguments, torch.float32))) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_decode_attention_equals_plain_attention(heads, kv_heads, dim, softcap, dtype):
    for slots, capacity in ROWS:
        query, *cache = random_tensors(
            [(len(slots), heads, dim), *[(len(slots), kv_heads, capacity, dim)] * 2], dtype
        )
        for row, slot in enumerate(slots):
            for values in cache:
                values[row, :, slot + 1 :] = float("nan")  # what lies after the query is unread
        arguments = (query, *cache, torch.tensor(slots))
        known = [values.nan_to_num() for values in cache]
        want = decode_attention(
            *moved((query, *known), torch.float32), arguments[-1], dim**-0.5, softcap
        )
        for _ in range(2):  # the second finds the counters as the first left them
            got = decode_attention(*moved(arguments, "cuda"), dim**-0.5, softcap).cpu()
            assert relative_error(got, want) < TOLERANCE[dtype]


def test_shares_of_the_keys_are_a_power_of_two_and_not_too_small():
    assert [num_splits(pairs, 16_512) for pairs in (1, 8, 64, 512)] == [128, 16, 2, 1]
    assert num_splits(8, 640) == 4
    assert [power_of_two(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("limit", [200_000, 143_000, 86_000, 42_000])
@pytest.mark.parametrize("item_bytes", [2, 4])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_tiles_fit_into_the_shared_memory_of_smaller_gpus(rows, item_bytes, limit):
    for width, outputs, is_gated in ((3072, 5120, False), (3072, 8192, True), (8192, 3072, False)):
        blocks = launch_blocks(rows, width, outputs, is_gated, has_norm=rows <= 16)
        wanted = dict(blocks)
        fit_tiles(blocks, is_gated, item_bytes, limit)
        tile_rows = blocks["BLOCK_M"] + blocks["BLOCK_N"] * (2 if is_gated else 1)
        assert tile_rows * blocks["BLOCK_K"] * item_bytes * blocks["STAGES"] <= limit
        assert blocks["BLOCK_K"] >= 16 and width % blocks["BLOCK_K"] == 0
        if item_bytes == 2 and limit == 200_000:
            assert blocks == wanted  # what was measured fits an H200


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_decode_attention_on_cpu_equals_the_formula(softcap):
    shapes = [(2, 6, 16), (2, 2, 20, 16), (2, 2, 20, 16)]
    query, keys, values = random_tensors(shapes, torch.float32)
    got = decode_attention(query, keys, values, torch.tensor([19, 7]), 0.25, softcap)
    for row, count in enumerate((20, 8)):
        for head in range(6):
            scores = keys[row, head // 3, :count] @ query[row, head] * 0.25
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            want = scores.softmax(0) @ values[row, head // 3, :count]
            torch.testing.assert_close(got[row, head], want)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_fused_projections_leave_a_layer_what_it_computes(architecture):
    model = make_model(architecture, "eager")
    layer = model.model.layers[0]
    hidden = torch.randn(2, 1, 48)
    angles = torch.randn(2, 1, 16)
    arguments = {
        "position_embeddings": (angles.cos(), angles.sin()),
        "attention_mask": None,
    }
    launches = []

    def fuse(module, _):
        launches.append(fuse_projections(module.graph))
        module.recompile()
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        fused = torch.compile(layer, backend=fuse, fullgraph=True)(hidden, **arguments)
        torch.testing.assert_close(fused, layer(hidden, **arguments))
    assert launches == [4]


def test_rows_after_the_prompt_are_causal_only_if_they_see_every_slot():
    hidden_slot = torch.zeros(2, 640, dtype=torch.bool)
    hidden_slot[1, 30] = True

    def without_hidden(b, h, q_idx, kv_idx):
        return causal(b, h, q_idx, kv_idx) & ~(hidden_slot[b, kv_idx] & (q_idx > 620))

    def bidirectional(b, h, q_idx, kv_idx):
        return q_idx >= 0

    first_slots = torch.tensor([100, 400])
    assert rows_are_causal(causal, first_slots, 640)
    assert rows_are_causal(bidirectional, first_slots, 640)  # later slots hold no key yet
    assert not rows_are_causal(without_hidden, first_slots, 640)
    assert rows_are_causal(without_hidden, first_slots, 620)
