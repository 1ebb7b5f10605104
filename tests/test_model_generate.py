"""The backend under ``model.generate``, as transformers runs it."""

from collections import Counter

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters

from flexmask.attention.backend import dense_attention, flexmask_attention
from flexmask.attention.strategy_context import use_strategy
from flexmask.block_mask import create_block_mask
from flexmask.errors import AttentionError
from flexmask.torch_internals import _has_compiled_graphs, compile_settings
from flexmask_strategies.ensemble_isolation import EnsembleIsolation
from oracles import make_model, oracle_tokens, random_request

NEW_TOKENS = 8


def padded_batch(device):
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(3, 211, (3, 70), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :25] = attention_mask[2, :1] = 0
    input_ids[attention_mask == 0] = 0
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


def generate(model, inputs, **options):
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0, **options
        )


def check_padded_batch(models, architecture, cache, device):
    inputs = padded_batch(device)
    options = dict(do_sample=False, cache_implementation=cache)
    got = generate(models(architecture, "flexmask", device), inputs, **options)
    want = generate(models(architecture, "eager", device), inputs, **options)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "olmo2"])
def test_a_padded_batch_generates_what_eager_attention_generates(
    models, architecture, cache, device
):
    check_padded_batch(models, architecture, cache, device)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("architecture", ["gemma2", "phi3"])
def test_caps_and_joined_projections_generate_what_eager_attention_generates(
    models, architecture, cache, device
):
    check_padded_batch(models, architecture, cache, device)


@pytest.mark.parametrize(
    ("queries", "lengths"),
    [(1, (*range(2, 34), 72, 88, 104, 120)), (5, (*range(6, 34), 72, 88, 104, 120, 136, 200))],
    ids=["1", "5"],
)
def test_any_number_of_keys_gives_what_dense_attention_gives(queries, lengths):
    compiled = 0
    for length in lengths:
        before = counters["stats"]["unique_graphs"]
        torch.manual_seed(length)
        query, key, value = (torch.randn(3, n, length, 16) for n in (6, 2, 2))
        query = query[:, :, -queries:]
        offset = torch.tensor(length - queries)

        def mask_mod(b, h, q_idx, kv_idx, offset=offset):
            return q_idx + offset >= kv_idx

        mask = create_block_mask(mask_mod, 3, None, queries, length, "cpu")
        axes = torch.arange(queries)[:, None], torch.arange(length)
        dense = mask_mod(0, 0, *axes).expand(3, 1, queries, length)
        with torch.no_grad():
            got, _ = flexmask_attention(torch.nn.Module(), query, key, value, mask)
            want, _ = dense_attention(torch.nn.Module(), query, key, value, dense)
        assert torch.allclose(got, want, atol=1e-5), length
        compiled = counters["stats"]["unique_graphs"] - before
    assert compiled == 0


def test_sampling_draws_what_eager_attention_draws(models, device):
    inputs = padded_batch(device)
    tokens = []
    for implementation in ("flexmask", "eager"):
        model = models("llama", implementation, device)
        torch.manual_seed(7)  # after the model, which is made at its first use, from a seed
        tokens.append(generate(model, inputs, do_sample=True, top_k=5).tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("strategy", [EnsembleIsolation()], ids=lambda s: s.name)
def test_a_strategy_in_a_context_generates_what_its_oracle_says(models, strategy, cache, device):
    requests = [random_request(1, 9, [20, 31, 15], 2), random_request(2, 14, [40, 12], 1)]
    layouts = [strategy.layout(request) for request in requests]
    model = models("llama", "flexmask", device)
    with use_strategy(strategy, layouts, device) as inputs:
        tokens = generate(model, inputs, do_sample=False, cache_implementation=cache)
    reference = models("llama", "sdpa", device)
    for row, layout in enumerate(layouts):
        want, _ = oracle_tokens(reference, strategy, layout, NEW_TOKENS)
        assert tuple(tokens[row, -NEW_TOKENS:].tolist()) == want


@pytest.mark.usefixtures("without_inductor")
def test_the_dense_backend_agrees_under_a_strategy(models, device):
    strategy = EnsembleIsolation()
    layouts = [strategy.layout(random_request(4, 3, [8, 10], 3))]
    tokens = []
    for implementation in ("flexmask", "flexmask_dense"):
        with use_strategy(strategy, layouts, device) as inputs:
            model = models("gemma2", implementation, device)
            tokens.append(generate(model, inputs, do_sample=False).tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.usefixtures("without_inductor")
def test_a_second_length_compiles_nothing(models):
    model = models("llama", "flexmask")
    for length in (40, 41, 150, 201, 77):
        inputs = {"input_ids": torch.full((2, length), 5)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        before = counters["stats"]["unique_graphs"]
        generate(model, inputs, do_sample=False, cache_implementation="dynamic")
        compiled = counters["stats"]["unique_graphs"] - before
    assert compiled == 0


@pytest.mark.usefixtures("without_inductor")
def test_dropped_keys_under_restarted_positions_are_refused(models):
    strategy = EnsembleIsolation()
    layouts = [strategy.layout(random_request(5, 10, [60, 60], 2))]
    with use_strategy(strategy, layouts) as inputs, pytest.raises(AttentionError, match="Engine"):
        generate(models("mistral", "flexmask"), inputs, do_sample=False)


def test_the_wrong_number_of_rows_is_refused(models):
    strategy = EnsembleIsolation()
    layouts = [strategy.layout(random_request(5, 10, [20], 2))]
    with pytest.raises(AttentionError, match="3 rows"), use_strategy(strategy, layouts):
        generate(models("llama", "flexmask"), padded_batch("cpu"), do_sample=False)


def test_dropout_in_training_is_refused():
    model = make_model("llama", "flexmask")
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(AttentionError, match=r"attention dropout 0.1"):
        model.train()(input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("option", ["s_aux", "position_bias"])
def test_an_unsupported_score_modification_is_refused(option):
    tensor = torch.zeros(1, 2, 4, 16)
    with pytest.raises(AttentionError, match=f"asks for attention with {option}"):
        flexmask_attention(torch.nn.Identity(), tensor, tensor, tensor, None, **{option: tensor})  # type: ignore[arg-type]


def test_a_missing_mask_is_never_taken_for_full_attention():
    tensor = torch.zeros(1, 2, 4, 16)
    with pytest.raises(AttentionError, match="needs a BlockMask, got NoneType"):
        flexmask_attention(torch.nn.Identity(), tensor, tensor, tensor, None)  # type: ignore[arg-type]


def test_compile_settings_are_put_back():
    before = torch._dynamo.config.specialize_int
    with compile_settings(torch.device("cpu")):
        assert torch._dynamo.config.specialize_int
    assert torch._dynamo.config.specialize_int == before


@pytest.mark.parametrize(
    ("has_graphs", "missed", "is_cached", "threads"),
    [(False, 0, True, 4), (True, 0, True, 1), (True, 1, True, 4), (True, 0, False, 4)],
)
def test_compile_workers_wait_until_a_graph_is_not_on_disk(
    tmp_path, monkeypatch, has_graphs, missed, is_cached, threads
):
    if has_graphs:
        (tmp_path / "fxgraph").mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(counters, "inductor", Counter(fxgraph_cache_miss=missed))
    _has_compiled_graphs.cache_clear()
    with torch._inductor.config.patch(compile_threads=4, fx_graph_cache=is_cached):
        with compile_settings(torch.device("cuda")):
            assert torch._inductor.config.compile_threads == threads
        with compile_settings(torch.device("cpu")):
            assert torch._inductor.config.compile_threads == 4
    _has_compiled_graphs.cache_clear()
