"""Which kernel computes prompts."""

from types import SimpleNamespace

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import BlockMask

from flexmask.attention.backend import dense_attention, flexmask_attention
from flexmask.attention.flex_call import PrefillKernel, _never_trivial
from flexmask.attention.model_probe import AttentionShape
from flexmask.block_mask.cache import BlockMaskCache
from flexmask.engine import prefill_kernel
from flexmask.engine.model_runner import ModelRunner
from flexmask.engine.prefill_kernel import (
    BLOCK_SIZE,
    FLASH_CAPACITY,
    PrefillKernels,
    prefill_tile,
)
from flexmask.errors import AttentionError, FlexMaskWarning
from flexmask_strategies.causal import Causal
from oracles import random_request

SHAPE = AttentionShape(8, 128, 128, has_softcap=False)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
LONG = FLASH_CAPACITY + BLOCK_SIZE


def kernels(asked=None, device=GPU):
    return PrefillKernels(asked, [SHAPE], torch.bfloat16, device)


def choose(kernels, capacity=LONG, *, changes_scores=False):
    return kernels.choose(Causal(), capacity, changes_scores=changes_scores)


@pytest.fixture(params=[True, False], ids=["flash", "no-flash"])
def has_flash(request, monkeypatch):
    monkeypatch.setattr(prefill_kernel, "flash_can_attend", lambda *_: request.param)
    return request.param


def test_what_is_asked_for_is_had_or_refused(has_flash):
    assert choose(kernels("triton")) == "triton"
    if not has_flash:
        with pytest.raises(AttentionError, match=r"needs flexmask\[flash\] installed"):
            kernels("flash")
        return
    assert choose(kernels("flash"), 640) == "flash"
    with pytest.raises(AttentionError, match="the strategy changes scores"):
        choose(kernels("flash"), changes_scores=True)


def test_flash_is_chosen_where_it_is_there_and_legal_and_faster(has_flash):
    assert choose(kernels()) == ("flash" if has_flash else "triton")
    assert choose(kernels(), 4224) == "triton"
    assert choose(kernels(), changes_scores=True) == "triton"


def test_a_cpu_has_one_kernel():
    assert choose(kernels(device=CPU)) is None
    with pytest.raises(AttentionError, match="'triton' runs on a GPU only"):
        kernels("triton", CPU)


@pytest.fixture
def refused(models, monkeypatch):
    """Kernels of which FLASH compiles no mask, and a runner that has them."""
    monkeypatch.setattr(prefill_kernel, "flash_can_attend", lambda *_: True)
    runner = ModelRunner(models("llama", "flexmask"), BlockMaskCache())
    runner.prepare(Causal(), 2, 640)
    asked = []

    def compute(prefill_kernel, **arguments):
        asked.append(prefill_kernel)
        if prefill_kernel == "flash":
            raise InductorError(RuntimeError("UNSUPPORTED OPERATION: 'maximum'"), None)
        return SimpleNamespace(last_hidden_state=torch.zeros(2, 1, 1))

    monkeypatch.setattr(runner, "_keys_model", SimpleNamespace(base_model=compute))
    return runner, asked


def prefill_with_flash(runner, asked_for):
    runner._kernels = kernels(asked_for)
    runner.prefill_kernel = choose(runner._kernels)
    layouts = [Causal().layout(random_request(seed, 9, [5], 1)) for seed in (1, 2)]
    runner.prefill(runner.plan(dict(enumerate(layouts))))


def test_where_flash_cannot_compile_a_mask_triton_goes_on_and_a_warning_says_so(refused):
    runner, asked = refused
    with pytest.warns(FlexMaskWarning, match="cannot compile the mask of strategy 'causal'"):
        prefill_with_flash(runner, None)
    assert asked == ["flash", "triton"]
    assert runner.prefill_kernel == choose(runner._kernels) == "triton"


def test_flash_that_was_asked_for_and_cannot_compile_a_mask_is_an_error(refused):
    runner, asked = refused
    with pytest.raises(AttentionError, match=r"'flash' cannot compile .* 'maximum'"):
        prefill_with_flash(runner, "flash")
    assert asked == ["flash"]


def test_short_prompts_have_small_tiles_with_tritons_kernel():
    cases: list[tuple[PrefillKernel | None, int, bool, tuple[int, int]]] = [
        ("triton", 640, True, (64, 32)),
        ("triton", 640, False, (128, 128)),  # FlexAttention's own blocks may be 128 wide
        ("triton", 16512, True, (64, 64)),
        ("triton", 65664, True, (128, 128)),
        ("flash", 640, True, (128, 128)),
        (None, 640, False, (64, 64)),
    ]
    for kernel, capacity, has_options, tile in cases:
        assert prefill_tile(kernel, capacity, has_options=has_options) == tile


def allows_all(b, h, q_idx, kv_idx):
    return b.new_ones((), dtype=torch.bool)


def hidden_by_tiles(device):
    """Three rows of tiles that allow all: tile 0 partial; 1 full; 0 partial and 2 full."""

    def tensor(values):
        return torch.tensor([[values]], dtype=torch.int32, device=device)

    return BlockMask.from_kv_blocks(
        tensor([1, 0, 1]),
        tensor([[0, 1, 2]] * 3),
        tensor([0, 1, 1]),
        tensor([[0, 1, 2], [1, 0, 2], [2, 0, 1]]),
        BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE),
        mask_mod=allows_all,
        seq_lengths=(3 * BLOCK_SIZE, 3 * BLOCK_SIZE),
        compute_q_blocks=False,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:Argument .* cannot be converted:UserWarning"
)  # FLASH's compiler
@pytest.mark.parametrize(
    ("kernel", "device"),
    [
        (None, "cpu"),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
        pytest.param("flash", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_empty_tiles_hide_keys_though_the_mask_mod_allows_all(kernel, device):
    """FLASH by itself would not look at the tiles (pytorch #188322)."""
    if kernel == "flash":
        pytest.importorskip("flash_attn.cute")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, 4, 3 * BLOCK_SIZE, 64)
    query, key, value = torch.randn(shape, generator=generator).to(device, dtype)
    sees = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool, device=device)
    dense = sees.repeat_interleave(BLOCK_SIZE, 0).repeat_interleave(BLOCK_SIZE, 1)[None, None]
    module = torch.nn.Module()
    with torch.no_grad():
        tiles = hidden_by_tiles(device)
        found, _ = flexmask_attention(module, query, key, value, tiles, prefill_kernel=kernel)
        wanted, _ = dense_attention(module, query.float(), key.float(), value.float(), dense)
    assert (found.float() - wanted).abs().max() < (1e-4 if device == "cpu" else 3e-2)


def test_flash_never_gets_a_mask_mod_that_it_takes_for_none():
    is_trivial = pytest.importorskip(
        "torch._inductor.kernel.flex.flex_flash_attention"
    ).is_trivial_mask_graph
    indices = torch.zeros(4, dtype=torch.int32).unbind()

    def graph(mask_mod):
        return make_fx(mask_mod, decomposition_table=select_decomp_table())(*indices)

    assert is_trivial(graph(allows_all))
    assert not is_trivial(graph(_never_trivial(allows_all)))
