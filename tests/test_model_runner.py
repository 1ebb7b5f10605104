"""Compiled prefill and decode against a dense pass over everything, token by token."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import rotate_half
from transformers.pytorch_utils import Conv1D

from family_models import small_model
from flexmask import mask_strategy
from flexmask.attention.backend import register_attention
from flexmask.attention.model_probe import WHOLE_MODEL
from flexmask.block_mask.cache import BlockMaskCache
from flexmask.engine.compiled_view import last_layer_name
from flexmask.engine.model_runner import ModelRunner, bucketed_capacity
from flexmask.engine.prefill_kernel import BLOCK_SIZE
from flexmask.engine.stream_planner import padded_length
from flexmask.errors import AttentionError, LayoutError, MaskError
from flexmask.layout import Layout, TokenizedRequest, copied_prefix_layout
from flexmask_strategies.block_attention import BlockAttention
from flexmask_strategies.causal import Causal
from flexmask_strategies.dilated import Dilated
from flexmask_strategies.document import Document
from flexmask_strategies.ensemble_isolation import EnsembleIsolation
from flexmask_strategies.few_shot_isolation import FewShotIsolation
from flexmask_strategies.global_window import GlobalWindow
from flexmask_strategies.parallel_context import ParallelContext
from flexmask_strategies.prefix_lm import PrefixLM
from flexmask_strategies.prefix_segment import PrefixSegment
from flexmask_strategies.sliding_window import SlidingWindow
from flexmask_strategies.strided import Strided
from flexmask_strategies.tree import Tree
from oracles import CONFIGS, oracle_tokens, random_request

CAPACITY = 640
STEPS = 32
REQUESTS = [
    random_request(1, 20, [30, 41, 25], 3),
    random_request(2, 7, [60], 1),
    random_request(3, 40, [30, 20, 40, 21], 5),
]
FOUR_LAYERS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
STRATEGIES = [
    Causal(),
    PrefixSegment(),
    EnsembleIsolation(),
    EnsembleIsolation("sequential"),
    FewShotIsolation(),
    ParallelContext(),
    BlockAttention(),
    Tree("0,1,1,2"),
    PrefixLM(),
    GlobalWindow(window=13),
    SlidingWindow(window=13, sinks=3),
    Dilated(window=13, dilation=3),
    Strided(stride=13),
    Document(),
]


@pytest.fixture(scope="session")
def runners(models):
    made = {}

    def get(architecture, device="cpu"):
        if (architecture, device) not in made:
            model = models(architecture, "flexmask", device)
            made[architecture, device] = ModelRunner(model, BlockMaskCache())
        return made[architecture, device]

    return get


def prefill(runner, layouts):
    runner.prefill(runner.plan(dict(enumerate(layouts))))


def decode(runner, strategy, layouts, steps=STEPS):
    """Greedy tokens ``(B, steps)`` and their logits ``(B, steps, V)``."""
    runner.prepare(strategy, len(layouts), CAPACITY)
    prefill(runner, layouts)
    token_ids = torch.tensor([[layout.token_ids[-1]] for layout in layouts], device=runner.device)
    tokens, logits = [], []
    for _ in range(steps):
        logits.append(runner.decode(token_ids))
        token_ids = logits[-1].argmax(-1, keepdim=True)
        tokens.append(token_ids)
    return torch.cat(tokens, 1), torch.stack(logits, 1)


def assert_equals_oracle(runner, reference, strategy, requests):
    layouts = [strategy.layout(request) for request in requests]
    tokens, logits = decode(runner, strategy, layouts)
    for row, layout in enumerate(layouts):
        want_tokens, want_logits = oracle_tokens(reference, strategy, layout, STEPS)
        assert tuple(tokens[row].tolist()) == want_tokens
        assert (logits[row] - want_logits).abs().max() < 1e-4


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_logits_and_tokens_equal_dense_attention(runners, models, strategy, device):
    runner, reference = runners("llama", device), models("llama", "sdpa", device)
    assert_equals_oracle(runner, reference, strategy, REQUESTS)


def test_windows_of_a_model_equal_dense_attention(runners, models, device):
    runner, reference = runners("mistral", device), models("mistral", "eager", device)
    assert_equals_oracle(runner, reference, EnsembleIsolation(), REQUESTS)


@pytest.mark.parametrize("architecture", ["gemma2", "olmo2", "phi3", "qwen2", "qwen3"])
def test_every_architecture_equals_dense_attention(models, architecture, device):
    # Without inductor on a CPU, where its kernels of attention are those of the tests above.
    backend = "eager" if device == "cpu" else None
    runner = ModelRunner(models(architecture, "flexmask", device), BlockMaskCache())
    # Eager attention, because SDPA leaves out Gemma's soft-capping.
    reference = models(architecture, "eager", device)
    with torch.compiler.set_stance(force_backend=backend):
        assert_equals_oracle(runner, reference, EnsembleIsolation(), REQUESTS)


@pytest.fixture
def with_key_table(runners, monkeypatch, device):
    """Prepares the Llama runner for requests that share a prefix, which is read once for all."""
    runner = runners("llama", device)
    monkeypatch.setattr(runner, "_pays_key_table", lambda batch_size: True)
    runner.release()
    prefix = random_request(5, 30, [], 1).prefix

    def prepared(strategy):
        requests = [dataclasses.replace(request, prefix=prefix) for request in REQUESTS]
        layouts = [strategy.layout(request) for request in requests]
        runner.prepare(strategy, 3, CAPACITY)
        assert runner.cache_prefix(layouts[0], 30)
        return runner, layouts

    yield prepared
    runner.release()


@pytest.mark.parametrize("strategy", [EnsembleIsolation(), Document()], ids=str)
def test_copies_of_a_prefix_that_are_read_once_count_as_often(
    with_key_table, models, strategy, device
):
    runner, layouts = with_key_table(strategy)
    tokens, logits = decode(runner, strategy, layouts)
    copies = [len(request.segments) for request in REQUESTS]
    assert runner.bound.key_table.sharing.tolist() == [[3, 30, count] for count in copies]
    for row, layout in enumerate(layouts):
        want_tokens, want_logits = oracle_tokens(
            models("llama", "sdpa", device), strategy, layout, STEPS
        )
        assert tuple(tokens[row].tolist()) == want_tokens
        assert (logits[row] - want_logits).abs().max() < 1e-4


def test_a_prefix_that_all_segments_of_a_prompt_see_counts_once(with_key_table):
    runner, layouts = with_key_table(PrefixSegment())
    prefill(runner, layouts)
    assert runner.bound.key_table.sharing.tolist() == [[3, 30, 1]] * 3  # of the spare row


@pytest.mark.parametrize("strategy", [PrefixSegment(), EnsembleIsolation()], ids=lambda s: s.name)
def test_keys_and_values_of_a_segment_equal_those_of_its_text_run_alone(runners, strategy, device):
    runner, request = runners("llama", device), REQUESTS[0]
    together = strategy.layout(request)
    rows = [together] * 3
    alone = [
        copied_prefix_layout(TokenizedRequest(request.prefix, (segment,), (5,)), "restart")
        for segment in request.segments
    ]
    runner.prepare(strategy, 3, CAPACITY)
    prefill(runner, rows)
    cached = [(k.clone(), v.clone()) for k, v in runner.cache.of_row(0, len(together))]
    runner.prepare(Causal(), 3, CAPACITY)
    prefill(runner, alone)
    for number, layout in enumerate(alone, start=1):
        own = [slot for slot, s in enumerate(together.segment_ids) if s == number]
        by_position = slice(len(layout) - 1 - len(own), len(layout) - 1)
        for (keys, values), (alone_keys, alone_values) in zip(
            cached, runner.cache.of_row(number - 1, len(layout)), strict=True
        ):
            torch.testing.assert_close(keys[:, own], alone_keys[:, by_position])
            torch.testing.assert_close(values[:, own], alone_values[:, by_position])


def test_the_last_of_packed_documents_generates_what_it_generates_alone(runners, device):
    runner, request = runners("llama", device), REQUESTS[0]
    packed = Document().layout(request)
    alone = Causal().layout(TokenizedRequest(request.prefix, request.segments[-1:], request.tail))
    tokens, logits = decode(runner, Document(), [packed] * 3)
    want_tokens, want_logits = decode(runner, Causal(), [alone] * 3)
    assert torch.equal(tokens, want_tokens)
    torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=0)


def test_blocks_at_consecutive_positions_are_blocks_alone_re_encoded(runners, models, device):
    runner, request = runners("llama", device), REQUESTS[0]
    together = BlockAttention().layout(request)
    runner.prepare(BlockAttention(), 3, CAPACITY)
    prefill(runner, [together] * 3)
    cached = [(k.clone(), v.clone()) for k, v in runner.cache.of_row(0, len(together))]
    runner.prepare(Causal(), 3, CAPACITY)
    alone = [Causal().layout(TokenizedRequest((), (block,), (5,))) for block in request.segments]
    prefill(runner, alone)
    rotate = models("llama", "flexmask", device).model.rotary_emb
    for number, block in enumerate(request.segments, start=1):
        first = together.segment_ids.index(number)
        cos, sin = rotate(cached[0][0][None], torch.tensor([[first]], device=device))
        own = slice(first, first + len(block))
        for (keys, values), (alone_keys, alone_values) in zip(
            cached, runner.cache.of_row(number - 1, len(block)), strict=True
        ):
            re_encoded = alone_keys * cos + rotate_half(alone_keys) * sin
            torch.testing.assert_close(keys[:, own], re_encoded, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(values[:, own], alone_values, atol=1e-5, rtol=1e-4)


def with_changed_token(layout, slot):
    token_ids = list(layout.token_ids)
    token_ids[slot] = 3 + (token_ids[slot] + 1) % 200
    return Layout(tuple(token_ids), layout.segment_ids, layout.position_ids)


@pytest.mark.parametrize("strategy", [PrefixSegment(), EnsembleIsolation()], ids=lambda s: s.name)
def test_a_token_changes_its_own_segment_and_the_first_generated_token_only(
    runners, strategy, device
):
    runner = runners("llama", device)
    layout = strategy.layout(random_request(9, 20, [30, 41], 3))
    changed = [with_changed_token(layout, layout.segment_ids.index(n) + 22) for n in (1, 2)]
    _, logits = decode(runner, strategy, [layout, *changed], steps=1)
    for row in (1, 2):  # row n has another token in segment n
        assert (logits[row, 0] - logits[0, 0]).abs().max() > 1e-3
        for other in {1, 2} - {row}:
            slots = [slot for slot, s in enumerate(layout.segment_ids) if s == other]
            before, after = (
                runner.cache.of_row(0, len(layout)),
                runner.cache.of_row(row, len(layout)),
            )
            for (keys, values), (new_keys, new_values) in zip(before, after, strict=True):
                assert torch.equal(keys[:, slots], new_keys[:, slots])
                assert torch.equal(values[:, slots], new_values[:, slots])


def test_equal_lengths_with_other_boundaries_never_share_a_mask(runners, models):
    strategy = PrefixSegment()
    runner, reference = runners("llama"), models("llama", "sdpa")
    for segments in ([50, 20, 30], [20, 50, 30], [50, 20, 30]):
        request = random_request(8, 10, segments, 2)
        layout = strategy.layout(request)
        tokens, _ = decode(runner, strategy, [layout] * 3, steps=4)
        want, _ = oracle_tokens(reference, strategy, layout, 4)
        assert tokens.tolist() == [list(want)] * 3


def test_a_repeated_layout_is_found_in_the_mask_cache(runners, monkeypatch):
    runner = runners("llama")
    runner.release()
    monkeypatch.setattr(runner, "_mask_cache", cache := BlockMaskCache())
    layouts = [EnsembleIsolation().layout(request) for request in REQUESTS]
    decode(runner, EnsembleIsolation(), layouts, steps=1)
    first, _ = decode(runner, EnsembleIsolation(), layouts, steps=2)
    assert (cache.stats.hits, cache.stats.misses) == (3, 3)  # one for each prompt
    again, _ = decode(runner, EnsembleIsolation(), layouts, steps=2)
    assert torch.equal(first, again)


def test_a_prompt_of_one_token_is_refused(runners):
    runner = runners("llama")
    runner.prepare(Causal(), 1, CAPACITY)
    with pytest.raises(LayoutError, match="at least two tokens"):
        prefill(runner, [Layout((5,), (-1,), (0,))])


def test_only_masks_that_decoding_reads_are_made(runners):
    runner = runners("llama")
    for strategy, is_read in ((Causal(), False), (SlidingWindow(window=13, sinks=3), True)):
        runner.release()
        decode(runner, strategy, [strategy.layout(REQUESTS[0])] * 3, steps=1)
        assert bool(runner.bound._decode_masks) == is_read


def test_a_mask_that_depends_on_the_head_is_refused_before_anything_runs(runners):
    class HeadWindows(Causal):
        def mask_mod(self, batch):
            def near_for_some_heads(b, h, q_idx, kv_idx):
                return (q_idx >= kv_idx) & ((h > 0) | (q_idx - kv_idx < 8))

            return near_for_some_heads

    with pytest.raises(MaskError, match="depends on the head"):
        runners("llama").prepare(HeadWindows(), 1, CAPACITY)


def test_a_model_that_attends_elsewhere_is_refused(models):
    with pytest.raises(AttentionError, match="attends by 'sdpa'; load it with"):
        ModelRunner(models("llama", "sdpa"), BlockMaskCache())


def test_a_prompt_that_fills_the_cache_is_refused(runners):
    runner = runners("llama")
    runner.prepare(Causal(), 1, 128)
    with pytest.raises(LayoutError, match="a prompt of 128 tokens needs a larger capacity"):
        prefill(runner, [Causal().layout(random_request(1, 100, [27], 1))])


@pytest.mark.parametrize("slots", [2, 511, 512, 513, 1024, 3000])
def test_a_bucketed_capacity_holds_the_slots_in_whole_tiles(slots):
    assert bucketed_capacity(slots) > slots
    assert bucketed_capacity(slots) % BLOCK_SIZE == 0


@pytest.mark.parametrize("lengths", [(6, 200), (16, 17, 60), (64, 65, 5, 127)])
def test_a_stream_has_the_tokens_of_all_rows_and_attends_in_tiles_of_one_row(runners, lengths):
    runner = runners("llama")
    runner.prepare(Causal(), 4, 640)
    layouts = [Causal().layout(random_request(n, 0, [n], 1)) for n in lengths]
    plan = runner.plan({3 - row: layout for row, layout in enumerate(layouts)})
    inputs = plan.inputs
    assert plan.rows == tuple(3 - row for row in range(len(lengths)))
    assert plan.computed_tokens == sum(lengths)
    assert 0 <= len(inputs.token_ids) - sum(lengths) < 16
    stream = inputs.stream
    prompts = [token for layout in layouts for token in layout.token_ids[:-1]]
    assert inputs.token_ids[: len(prompts)].tolist() == prompts
    places = stream.places.long()
    assert stream.queries.flatten()[places[: len(prompts)]].tolist() == list(range(len(prompts)))
    rows = inputs.tile_rows.repeat_interleave(runner._tile[0])[places]
    slots = inputs.tile_slots.flatten()[places]
    assert (rows * 640 + slots)[stream.sources.long()].tolist() == stream.slots.tolist()
    work = inputs.tiles[WHOLE_MODEL].counts + inputs.tiles[WHOLE_MODEL].full_counts
    assert (work.diff() <= 0).all()


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(
    ("family", "changes", "used"),
    [
        ("llama", {}, {"q_proj", "k_proj", "v_proj"}),
        ("gpt2", {}, {"c_attn"}),
        ("cohere2", {}, {"q_proj", "k_proj", "v_proj"}),
        # A layer that takes keys and values from an earlier one projects queries alone.
        ("gemma4_text", {"num_kv_shared_layers": 2} | FOUR_LAYERS, {"q_proj"}),
    ],
)
def test_a_prefill_ends_once_its_last_layer_has_written_keys_and_values(family, changes, used):
    runner, strategy = ModelRunner(small_model(family, **changes), BlockMaskCache()), Causal()
    runner.prepare(strategy, 2, CAPACITY)
    plan = runner.plan(dict(enumerate(strategy.layout(request) for request in REQUESTS[:2])))
    assert plan.inputs is not None
    last = runner._keys_model.get_submodule(last_layer_name(list(runner.cache._shapes)))
    ran = set()
    for name, module in last.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            own = name.rpartition(".")[2]
            module.register_forward_hook(lambda *_, own=own: ran.add(own))
    runner.prefill(plan)
    assert ran == used
    written = [tensor.clone() for pair in runner.cache.of_row(1, 90) for tensor in pair]
    runner.cache.bind(2, CAPACITY)
    with torch.no_grad():
        runner._pass(runner._states_model, plan.inputs.over(plan.inputs.packed(runner._slack)))
    whole = [tensor for pair in runner.cache.of_row(1, 90) for tensor in pair]
    for own, other in zip(written, whole, strict=True):
        torch.testing.assert_close(own, other)


def test_rows_that_are_not_planned_keep_their_prompts_and_go_on(runners, models):
    runner, reference, strategy = runners("llama"), models("llama", "sdpa"), EnsembleIsolation()
    layouts = [strategy.layout(request) for request in REQUESTS]
    runner.prepare(strategy, 3, CAPACITY)
    prefill(runner, layouts[:2])
    token_ids = torch.tensor([[layouts[0].token_ids[-1]], [layouts[1].token_ids[-1]], [0]])
    tokens = []
    for step in range(8):
        if step == 3:  # row 0 gets another prompt
            runner.prefill(runner.plan({0: layouts[2]}))
            token_ids[0] = layouts[2].token_ids[-1]
        token_ids = runner.decode(token_ids).argmax(-1, keepdim=True)
        tokens.append(token_ids[:, 0].tolist())
    of_row_0, of_row_1, _ = zip(*tokens, strict=True)
    for got, layout in (
        (of_row_0[:3], layouts[0]),
        (of_row_0[3:], layouts[2]),
        (of_row_1, layouts[1]),
    ):
        assert got == oracle_tokens(reference, strategy, layout, len(got))[0]


@pytest.mark.parametrize("strategy", [Causal(), PrefixSegment(), EnsembleIsolation()], ids=str)
def test_what_prompts_of_a_prefill_begin_with_is_computed_once(runners, models, strategy):
    runner, reference = runners("llama"), models("llama", "sdpa")
    common = random_request(4, 40, [], 1).prefix
    layouts = [
        strategy.layout(TokenizedRequest(common[:n], ((20 + row,) * 3, (30 + row,) * 3), (5, 6)))
        for row, n in enumerate((40, 40, 30, 7))
    ]
    runner.prepare(strategy, 4, CAPACITY)
    plan = runner.plan(dict(enumerate(layouts)), 8)
    alone = sum(len(layout) - 1 for layout in layouts)
    # ensemble_isolation has two copies of the prefix in each prompt; both are shared.
    has_copies = isinstance(strategy, EnsembleIsolation)
    again = 40 + 2 * 40 + 2 * 30 if has_copies else 40 + 30
    assert plan.computed_tokens == alone - again
    assert plan.copied_tokens == again
    tokens, logits = decode(runner, strategy, layouts[:3], steps=8)
    for row, layout in enumerate(layouts[:3]):
        want_tokens, want_logits = oracle_tokens(reference, strategy, layout, 8)
        assert tuple(tokens[row].tolist()) == want_tokens
        assert (logits[row] - want_logits).abs().max() < 1e-4


def test_tiles_of_one_batch_entry_compute_the_same(runners, models, monkeypatch):
    runner = runners("llama")
    runner.release()
    monkeypatch.setattr(ModelRunner, "_has_flat_tiles", True)  # as for FLASH
    assert_equals_oracle(runner, models("llama", "sdpa"), EnsembleIsolation(), REQUESTS)
    runner.release()


def test_nan_of_an_earlier_prompt_does_not_reach_the_next(runners):
    runner, strategy = runners("llama"), SlidingWindow(window=13, sinks=3)
    layout = strategy.layout(REQUESTS[0])
    runner.release()
    want, _ = decode(runner, strategy, [layout] * 3, steps=3)
    for keys, values in runner.cache.of_row(0, CAPACITY):
        keys.fill_(torch.nan)
        values.fill_(torch.nan)
    again, _ = decode(runner, strategy, [layout] * 3, steps=3)
    assert torch.equal(want, again)


@pytest.mark.parametrize(
    ("length", "padded"), [(1, 128), (1024, 1024), (1030, 1152), (9000, 9216)]
)
def test_lengths_on_a_gpu_are_padded_by_an_eighth_at_most(length, padded):
    assert padded_length(length, on_gpu=True) == padded


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_bfloat16_stays_near_dense_attention_in_float32(models, strategy):
    reference = models("llama", "sdpa", "cuda")
    model = copy.deepcopy(models("llama", "flexmask", "cuda")).bfloat16()
    layouts = [strategy.layout(request) for request in REQUESTS]
    runner = ModelRunner(model, BlockMaskCache())
    _, logits = decode(runner, strategy, layouts, steps=1)
    for row, layout in enumerate(layouts):
        _, want = oracle_tokens(reference, strategy, layout, 1)
        assert (logits[row].float() - want).norm() / want.norm() < 0.05


@pytest.mark.gpu
def test_a_row_depends_on_its_batch_by_rounding_only(runners):
    strategy = EnsembleIsolation()
    runner = runners("llama", "cuda")
    layouts = [strategy.layout(request) for request in REQUESTS]
    _, together = decode(runner, strategy, layouts, steps=4)
    for row, layout in enumerate(layouts):
        _, alone = decode(runner, strategy, [layout], steps=4)
        assert (alone[0] - together[row]).norm() / alone[0].norm() < 1e-5


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_flash_computes_what_tritons_kernel_computes(strategy):
    pytest.importorskip("flash_attn.cute")
    register_attention()
    config: Any = copy.deepcopy(CONFIGS["llama"])
    config.head_dim, config.max_position_embeddings = 64, 8192
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model = model.cuda().bfloat16().eval()
    model.set_attn_implementation("flexmask")
    layouts = [
        strategy.layout(random_request(seed, 100, [900, 800 + seed, 1000, 1200], 5))
        for seed in (1, 2)
    ]
    computed = {}
    for kernel in ("flash", "triton"):
        runner = ModelRunner(model, BlockMaskCache(), kernel)
        runner.prepare(strategy, 2, bucketed_capacity(5000))
        prefill(runner, layouts)
        cached = [pair for row in (0, 1) for pair in runner.cache.of_row(row, 4000)]
        computed[kernel] = [values.clone() for pair in cached for values in pair]
    for flash, triton in zip(*computed.values(), strict=True):
        assert (flash - triton).norm() / triton.norm() < 1e-2


@mask_strategy
def sees_kept_segments(batch):
    """A token sees the segments that are listed for its own."""
    kept = batch.table([[0, 1], [1, 2], [2, 0]])
    ids = batch.segment_ids

    def allowed(b, h, q_idx, kv_idx):
        listed = kept[ids[b, q_idx].clamp(0, 2)] == ids[b, kv_idx]
        return (q_idx >= kv_idx) & (listed.any(-1) | (q_idx == kv_idx))

    return allowed


def test_a_mask_that_reduces_is_refused_before_anything_runs(models):
    runner = ModelRunner(models("llama", "flexmask"), BlockMaskCache())
    with pytest.raises(MaskError, match=r"calls any\(\), a reduction, which FlexAttention cannot"):
        runner.prepare(sees_kept_segments(), 1, 256)


@pytest.mark.parametrize("kernel", ["flash", "triton"])
def test_a_prefill_kernel_that_cannot_be_had_is_refused(models, kernel):
    with pytest.raises(AttentionError, match=f"prefill kernel '{kernel}' runs on a GPU only"):
        ModelRunner(models("llama", "flexmask"), BlockMaskCache(), kernel)
