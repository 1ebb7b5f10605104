"""The decode step's kernels against plain tensor operations, and what they take the place of."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from flexmask.attention.backend import CausalRows, bound_cache
from flexmask.block_mask.equality import rows_are_causal
from flexmask.engine.compiled_view import multiply_few_rows
from flexmask.engine.fused_projections import fuse_projections
from flexmask.engine.fused_rotary import fuse_rotary
from flexmask.engine.rank_group import make_store
from flexmask.kernels.decode_attention import decode_attention, num_splits
from flexmask.kernels.few_rows import MANY_OUTPUTS, linear_of_few_rows
from flexmask.kernels.launch import power_of_two
from flexmask.kernels.projection import ACTIVATIONS, project
from flexmask.kernels.projection_tiles import (
    dense_blocks,
    digit_blocks,
    fit_tiles,
    float8_blocks,
)
from flexmask.kernels.rounded_linear import rounded_rows
from flexmask.mask_mods import causal
from flexmask.tensor_parallel.sharding import SummedLinear
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
        arguments: Any = (x, weights, biases, [], norm, 1e-5, activation, residual)
        got = project(*moved(arguments, "cuda")).cpu()
        assert relative_error(got, project(*moved(arguments, torch.float32))) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_projections_of_8_bits_equal_plain_products(rows, packed):
    shapes = [(rows, 1536), (1536,), (96, 1536), (96, 1536)]
    x, norm, *wide = random_tensors(shapes, torch.bfloat16)
    weights, scales = zip(*(rounded_rows(weight, packed) for weight in wide), strict=True)
    for activation, norm_weight in itertools.product(("", "silu"), (None, norm)):
        arguments: Any = (
            x, list(weights), [], list(scales), norm_weight, 1e-5, activation, None
        )  # fmt: skip
        got = project(*moved(arguments, "cuda")).cpu()
        assert relative_error(got, project(*arguments)) < TOLERANCE[torch.bfloat16]


def decode_step(rows, heads, kv_heads, dim, capacity, is_rotated, dtype):
    """Random query, key, value, angles and caches of one decode step."""
    own = [(rows, heads, dim), *[(rows, kv_heads, dim)] * 2]
    angles = [(rows, dim)] * 2
    tensors = random_tensors([*own, *angles, *[(kv_heads, rows, capacity, dim)] * 2], dtype)
    return tensors if is_rotated else [*tensors[:3], None, None, *tensors[5:]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("softcap", "is_rotated"), [(0.0, True), (5.0, False)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_decode_attention_equals_plain_attention(heads, kv_heads, dim, softcap, is_rotated, dtype):
    for slots, capacity in ROWS:
        step = decode_step(len(slots), heads, kv_heads, dim, capacity, is_rotated, dtype)
        for row, slot in enumerate(slots):
            for cache in step[5:]:
                cache[:, row, slot:] = float("nan")  # what lies there is unread
        known = [*step[:5], *(cache.nan_to_num() for cache in step[5:])]
        rest = (torch.tensor(slots), dim**-0.5, softcap)
        wide = moved(known, torch.float32)
        want = decode_attention(*wide, *rest)
        for _ in range(2):  # the second finds the counters as the first left them
            arguments = moved((*step, *rest), "cuda")
            assert relative_error(decode_attention(*arguments).cpu(), want) < TOLERANCE[dtype]
            for cache, plain in zip(arguments[5:7], wide[5:], strict=True):
                for row, slot in enumerate(slots):
                    got = cache[:, row, : slot + 1].cpu()
                    assert relative_error(got, plain[:, row, : slot + 1]) < TOLERANCE[dtype]


def test_shares_of_the_keys_are_a_power_of_two_and_not_too_small():
    assert [num_splits(pairs, 16_512) for pairs in (1, 8, 64, 512)] == [128, 16, 2, 1]
    assert num_splits(8, 640) == 8
    assert [power_of_two(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("limit", [200_000, 143_000, 86_000, 42_000])
@pytest.mark.parametrize("item_bytes", [2, 4])
@pytest.mark.parametrize(
    "chosen", [dense_blocks, lambda rows, *shape: float8_blocks(*shape)], ids=["dense", "float8"]
)
@pytest.mark.parametrize("rows", [2, 8, 64])
def test_tiles_fit_into_the_shared_memory_of_smaller_gpus(rows, chosen, item_bytes, limit):
    for width, outputs, is_gated in ((3072, 5120, False), (3072, 8192, True), (8192, 3072, False)):
        blocks = chosen(rows, width, outputs, is_gated, rows <= 16)
        wanted = dict(blocks)
        fit_tiles(blocks, is_gated, item_bytes, limit)
        tile_rows = blocks["BLOCK_M"] + blocks["BLOCK_N"] * (2 if is_gated else 1)
        assert tile_rows * blocks["BLOCK_K"] * item_bytes * blocks["STAGES"] <= limit
        assert blocks["BLOCK_K"] >= 16
        assert width % blocks["BLOCK_K"] == 0
        if item_bytes == 2 and limit == 200_000:
            assert blocks == wanted  # what was measured fits an H200


@pytest.mark.parametrize("rows", [2, 8, 64])
def test_tiles_of_digits_fit_into_shared_memory(rows):
    for is_gated in (False, True):
        blocks = digit_blocks(rows, 3072, 8192, is_gated)
        fit_tiles(blocks, is_gated, 1, 86_000)
        tile_rows = 4 * blocks["BLOCK_M"] + blocks["BLOCK_N"] * (2 if is_gated else 1)
        assert tile_rows * blocks["BLOCK_K"] * blocks["STAGES"] <= 86_000


@pytest.mark.parametrize("slots", [[19, 7], [11, 11]], ids=["ragged", "even"])
@pytest.mark.parametrize(("softcap", "is_rotated"), [(0.0, False), (2.0, True)])
def test_decode_attention_on_cpu_equals_the_formula(softcap, is_rotated, slots):
    step = decode_step(2, 6, 2, 16, 20, is_rotated, torch.float32)
    clones: list[Any] = [None if t is None else t.clone() for t in step]
    query, key, value, cos, sin, keys, values = clones
    got = decode_attention(*step, torch.tensor(slots), 0.25, softcap)
    if is_rotated:
        query, key = (
            x * cos[:, None] + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin[:, None]
            for x in (query, key)
        )
    for row, slot in enumerate(slots):
        keys[:, row, slot], values[:, row, slot] = key[row], value[row]
        for head in range(6):
            scores = keys[head // 3, row, : slot + 1] @ query[row, head] * 0.25
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            want = scores.softmax(0) @ values[head // 3, row, : slot + 1]
            torch.testing.assert_close(got[row, head], want)
    for cache, expected in zip(step[5:], (keys, values), strict=True):
        torch.testing.assert_close(cache, expected)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_key_table_that_names_copies_once_changes_nothing(softcap, device):
    step = decode_step(3, 6, 2, 16, 20, True, torch.float32)
    copies = {0: (2, 7, 12), 1: (0, 9), 2: ()}  # first slots of 4 keys that row 0 holds too
    slots = torch.tensor([17, 14, 6])
    key_slots = torch.zeros(3, 20, dtype=torch.int32)
    for row, starts in copies.items():
        copied = [slot for start in starts for slot in range(start, start + 4)]
        for cache in step[5:]:
            for start in starts:
                cache[:, row, start : start + 4] = cache[:, 0, 2:6]
        shared = [2, 3, 4, 5] if starts else []
        keys = shared + [slot for slot in range(int(slots[row])) if slot not in copied]
        key_slots[row, : len(keys)] = torch.tensor(keys)
    sharing = torch.tensor([[0, 4, 3], [0, 4, 2], [0, 0, 0]], dtype=torch.int32)
    own, caches = step[:5], step[5:]
    want = decode_attention(*own, *(c.clone() for c in caches), slots, 0.25, softcap)
    arguments = (*own, *caches, slots, 0.25, softcap, key_slots, sharing)
    got = decode_attention(*moved(arguments, device)).cpu()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("outputs", [40, MANY_OUTPUTS])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 33])
def test_few_rows_times_weights_are_a_linear_layer(rows, outputs, has_bias, dtype):
    shapes = [(rows, 1, 64), (outputs, 64), (outputs,)]
    x, weight, bias = random_tensors(shapes, dtype)
    bias = bias if has_bias else None
    got = linear_of_few_rows(x, weight, bias)
    assert relative_error(got, torch.nn.functional.linear(x, weight, bias)) < TOLERANCE[dtype]


def test_linear_layers_of_a_decode_step_on_a_cpu_are_others_and_the_models_stay():
    model = make_model("llama", "flexmask")
    view = copy.deepcopy(model)
    multiply_few_rows(view)
    x = torch.randn(3, 48)
    linear = [module for module in view.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 2 * 7 + 1
    assert all("forward" in vars(module) for module in linear)
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(view.lm_head(x), model.lm_head(x))


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


def sums_of(nodes):
    return [node for node in nodes if "sum_over_ranks" in str(node.target)]


def test_a_residual_is_added_by_the_first_rank_before_the_sum_over_ranks():
    layer = make_model("llama", "eager").model.layers[0]
    hidden, angles = torch.randn(2, 1, 48), torch.randn(2, 1, 16)
    arguments = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
    wanted = layer(hidden, **arguments)
    layer.self_attn.o_proj = SummedLinear(layer.self_attn.o_proj, None)
    layer.mlp.down_proj = SummedLinear(layer.mlp.down_proj, None)
    sums = []

    def fuse(module, _):
        launches = fuse_projections(module.graph)
        module.graph.eliminate_dead_code()
        nodes = list(module.graph.nodes)
        # torch 2.11 knows of overloads only that they change a tensor, and not of packets.
        assert all(isinstance(node.target, torch._ops.OpOverload) for node in sums_of(nodes))
        assert len(sums_of(nodes)) == 2
        launched = [n for n in nodes if n.target is torch.ops.flexmask.project.default]
        sums.append((launches, sum(node.args[-1] is not None for node in launched)))
        module.recompile()
        return module.forward

    store = make_store(0, 1, is_first=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch._dynamo.reset()
        with torch.no_grad():
            fused = torch.compile(layer, backend=fuse, fullgraph=True)(hidden, **arguments)
        torch.testing.assert_close(fused, wanted)
    finally:
        dist.destroy_process_group()
    assert sums == [(4, 2)]


@pytest.mark.parametrize(("architecture", "places"), [("llama", 1), ("qwen3", 1), ("phi3", 0)])
def test_rotary_embeddings_move_into_attention_where_that_turns_whole_heads(architecture, places):
    layer = make_model(architecture, "flexmask").model.layers[0]
    for name in ("key_cache", "value_cache"):
        layer.self_attn.register_buffer(name, torch.randn(2, 2, 128, 16))
    none = torch.zeros(2, 1, 1, 1, dtype=torch.int32)
    hidden, angles = torch.randn(2, 1, 48), torch.randn(2, 1, 16)
    arguments = {
        "position_embeddings": (angles.cos(), angles.sin()),
        "attention_mask": CausalRows.from_kv_blocks(none[..., 0], none, seq_lengths=(1, 128)),
        "cache_slots": torch.tensor([20, 99]),
    }
    fused = []

    def fuse(module, _):
        fused.append(fuse_rotary(module.graph))
        module.recompile()
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(layer, backend=fuse, fullgraph=True)(hidden, **arguments)
        caches = [cache.clone() for cache in bound_cache(layer.self_attn)]
        torch.testing.assert_close(got, layer(hidden, **arguments))
    assert fused == [places]
    for cache, plain in zip(caches, bound_cache(layer.self_attn), strict=True):
        torch.testing.assert_close(cache, plain)


def test_rows_after_the_prompt_are_causal_only_if_they_see_every_slot():
    hidden_slot = torch.zeros(2, 640, dtype=torch.bool)
    hidden_slot[1, 30] = True

    def without_hidden(b, h, q_idx, kv_idx):
        return causal(b, h, q_idx, kv_idx) & ~(hidden_slot[b, kv_idx] & (q_idx > 620))

    def bidirectional(b, h, q_idx, kv_idx):
        return q_idx >= 0

    first_slots = torch.tensor([100, 400])

    def proved(mask_mod, num_queries):
        rows = torch.arange(2)
        return rows_are_causal(mask_mod, rows, first_slots, num_queries, 640).tolist()

    assert proved(causal, 540) == [True, True]
    assert proved(bidirectional, 540) == [True, True]  # later slots hold no key yet
    assert proved(without_hidden, 540) == [True, False]
    assert proved(without_hidden, 200) == [True, True]
