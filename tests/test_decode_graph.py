"""The captured decode step, on a GPU."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GenerationConfig

from flexmask.attention.flex_call import _padded_groups, _without_padding
from flexmask.block_mask.cache import BlockMaskCache
from flexmask.engine.decode_graph import WARM_UP_STEPS, DecodeGraph
from flexmask.engine.decode_loop import DecodeLoop
from flexmask.engine.generation_rules import GenerationRules
from flexmask.engine.graph_capture import GraphCapture, capturing
from flexmask.engine.logit_fusion import LogitFusion
from flexmask.engine.model_runner import ModelRunner
from flexmask.engine.row_processors import BatchProcessors
from flexmask.engine.sampler import NO_TOKEN, NOT_FINITE
from flexmask.errors import FlexMaskWarning
from flexmask.fusion import Fusion
from flexmask.sampling import Sampling
from flexmask_strategies.prefix_segment import PrefixSegment
from oracles import random_request

LAYOUTS = [PrefixSegment().layout(random_request(seed, 9, [20, 30], 2)) for seed in (1, 2)]
PROMPTS = [layout.token_ids for layout in LAYOUTS]
UUIDS = ["a", "b"]
STEPS = 12


@pytest.fixture(scope="module")
def runner(models):
    return ModelRunner(models("llama", "flexmask", "cuda"), BlockMaskCache())


def decode(runner, loop, groups=()):
    loop.load(range(len(LAYOUTS)), PROMPTS, UUIDS, groups)
    runner.prefill(runner.plan(dict(enumerate(LAYOUTS))))
    return steps_of(loop, STEPS)


def steps_of(loop, count):
    steps = [loop.step() for _ in range(count)]
    torch.cuda.synchronize()
    return [step.token_ids[:, 0].tolist() for step in steps]


def new_loop(runner, sampling=Sampling(), eos=()):
    runner.prepare(PrefixSegment(), len(LAYOUTS), 640)
    return DecodeLoop(runner, sampling, STEPS, eos)


def without_graph(loop):
    loop.capture.no_graph_reason = "asked for by this test"
    return loop


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, top_k=40, top_p=0.9, seed=3)])
def test_the_graph_gives_what_steps_without_it_give(runner, sampling):
    expected = decode(runner, without_graph(new_loop(runner, sampling)))
    loop = new_loop(runner, sampling)
    assert decode(runner, loop) == expected
    assert decode(runner, loop) == expected  # replayed from the start
    assert loop.capture.no_graph_reason == ""
    assert len(expected) == STEPS


@pytest.mark.gpu
@pytest.mark.parametrize("fusion", [Fusion("mean"), Fusion("weighted_max", "confidence")], ids=str)
def test_the_graph_fuses_the_groups_that_are_loaded_into_it(runner, fusion):
    def fusing_loop():
        runner.prepare(PrefixSegment(), len(LAYOUTS), 640)
        fuse = LogitFusion(fusion, 2, len(LAYOUTS), runner.device)
        return DecodeLoop(runner, Sampling(), STEPS, (), fuse)

    together, apart = [((0, 1), (1.0, 2.0))], [((0,), (1.0,)), ((1,), (1.0,))]
    loop = fusing_loop()
    for groups in (together, apart, together):
        assert decode(runner, loop, groups) == decode(runner, without_graph(fusing_loop()), groups)
    assert loop.capture.no_graph_reason == ""
    assert all(first == second for first, second in decode(runner, loop, together))
    assert decode(runner, loop, apart) == decode(runner, new_loop(runner))


@pytest.fixture
def processors(models, tokenizer, monkeypatch):
    """Makes processors anew, since they note what each row holds."""
    model = models("llama", "flexmask", "cuda")
    config = GenerationConfig(
        repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=3, eos_token_id=2
    )
    monkeypatch.setattr(model, "generation_config", config)
    rules = GenerationRules.of(model, tokenizer)
    return lambda: BatchProcessors(rules, STEPS, model.device)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, top_k=40, seed=3)], ids=str)
def test_the_graph_up_to_the_logits_gives_what_steps_without_it_give(runner, processors, sampling):
    def decode_processed(loop):
        loop.processors = processors()
        tokens = decode(runner, loop)
        loop.processors = None
        return tokens

    loop = new_loop(runner, sampling)
    plain = decode(runner, loop)
    expected = decode_processed(without_graph(new_loop(runner, sampling)))
    assert decode_processed(loop) == expected != plain
    assert decode_processed(loop) == expected
    assert decode(runner, loop) == plain  # a graph of the whole step beside it
    assert loop.capture.no_graph_reason == ""


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, seed=3)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_graph_tells_a_row_without_a_finite_maximum(runner, monkeypatch, sampling, value):
    step, spoil = runner.decode, torch.zeros(2, 211, device="cuda")

    def spoilt_step(token_ids):
        return step(token_ids) + spoil

    monkeypatch.setattr(runner, "decode", spoilt_step)
    loop = new_loop(runner, sampling)
    expected = decode(runner, loop)
    spoil[0, 7], spoil[1, :100] = value, -torch.inf
    tokens = decode(runner, loop)
    assert [row[0] for row in tokens] == [NOT_FINITE] + [0] * (STEPS - 1)
    assert all(row[1] >= 100 for row in tokens)
    spoil[1] = -torch.inf
    assert decode(runner, loop)[0] == [NOT_FINITE, NO_TOKEN]
    spoil.zero_()
    assert decode(runner, loop) == expected
    assert loop.capture.no_graph_reason == ""


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_without_a_graph_and_says_so(runner, monkeypatch):
    expected = decode(runner, new_loop(runner))
    step = runner.decode

    def waiting_step(token_ids):
        token_ids.sum().item()  # waits for the device, which a capture forbids
        return step(token_ids)

    monkeypatch.setattr(runner, "decode", waiting_step)
    with pytest.warns(FlexMaskWarning, match="without a CUDA graph"):
        assert decode(runner, new_loop(runner)) == expected


@pytest.mark.gpu
def test_a_row_that_has_ended_repeats_its_last_token(runner):
    expected = decode(runner, new_loop(runner))
    ending = expected[2][0]
    ended = decode(runner, new_loop(runner, eos=[ending]))
    first = [tokens[0] for tokens in expected].index(ending)
    assert [tokens[0] for tokens in ended[first:]] == [ending] * (STEPS - first)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, top_k=40, seed=3)], ids=str)
def test_a_prompt_that_is_loaded_beside_a_running_row_gets_the_tokens_it_gets_alone(
    runner, sampling
):
    first, second = zip(*decode(runner, new_loop(runner, sampling)), strict=True)
    loop = new_loop(runner, sampling)
    for row in (0, 1):
        loop.load([row], [PROMPTS[row]], [UUIDS[row]])
        runner.prefill(runner.plan({row: LAYOUTS[row]}))
        found = steps_of(loop, 5 if row == 0 else STEPS)
        if row == 0:
            begun = [tokens[0] for tokens in found]
    assert [*begun, *(tokens[0] for tokens in found)][:STEPS] == list(first)
    assert [tokens[1] for tokens in found] == list(second)
    assert loop.capture.no_graph_reason == ""


@pytest.mark.gpu
def test_rows_that_see_all_before_take_the_kernel_made_for_them(runner, models):
    decode(runner, new_loop(runner))
    assert set(runner.decode_kernels.values()) == {"decode_attention"}
    windowed = ModelRunner(models("mistral", "flexmask", "cuda"), BlockMaskCache())
    decode(windowed, new_loop(windowed))
    assert set(windowed.decode_kernels.values()) == {"flex_attention"}


@pytest.mark.gpu
def test_a_graph_that_the_garbage_collector_finds_during_a_capture_does_not_invalidate_it():
    state = torch.zeros(4, device="cuda")
    garbage: list[object] = [DecodeGraph(lambda: state.add_(1), [state])]
    garbage.append(garbage)
    held, calls = [garbage], 0
    del garbage

    def step():
        nonlocal calls
        calls += 1
        if calls > WARM_UP_STEPS:
            held.clear()
        assert [[] for _ in range(5000)]  # each may start the garbage collector
        return state.add_(1)

    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        graph = DecodeGraph(step, [state])
    finally:
        gc.set_threshold(*thresholds)
    assert gc.isenabled()
    assert graph.replay().tolist() == [1.0] * 4


@pytest.mark.gpu
def test_the_first_product_of_a_thread_can_be_captured():
    x = torch.full((4, 4), 0.5, device="cuda")
    graph = torch.cuda.CUDAGraph()

    def capture():
        with capturing(graph):
            return x @ x

    with ThreadPoolExecutor(1) as pool:
        product = pool.submit(capture).result()
    graph.replay()
    assert product.tolist() == [[1.0] * 4] * 4


def test_the_reason_for_no_graph_is_the_error_that_failed_the_capture():
    def fail():
        try:
            raise RuntimeError("it waits\nfor the host")
        finally:
            raise RuntimeError("a previous error during capture")

    capture = GraphCapture("decoding runs")
    with pytest.warns(FlexMaskWarning, match="runs without a CUDA graph: it waits for the"):
        assert capture.attempt(fail) is None
    assert capture.no_graph_reason == "it waits for the host"


def test_padding_of_head_groups_is_taken_off_again():
    query = torch.randn(2, 6, 1, 4, device="meta")
    assert _padded_groups(query, 2).shape == (2, 6, 1, 4)  # only CUDA has the kernel
    padded = torch.arange(16.0).view(1, 8, 1, 2)
    kept = _without_padding(padded, heads=6, kv_heads=2)
    assert kept[0, :, 0, 0].tolist() == [0, 2, 4, 8, 10, 12]
