"""Models that a mask cannot govern are refused by name; the others are what they are alone."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from family_models import families, known, small_model
from flexmask.attention.added_mask import OwnScoresError
from flexmask.attention.backend import flexmask_attention, register_attention
from flexmask.attention.model_block_mask import ModelBlockMask
from flexmask.attention.model_probe import WHOLE_MODEL, probe_model, rotation_limit
from flexmask.attention.strategy_context import use_strategy
from flexmask.block_mask import create_block_mask
from flexmask.engine import Engine
from flexmask.errors import AttentionError, RequestError
from flexmask.mask_mods import causal
from flexmask.request import Request
from flexmask_strategies.causal import Causal
from flexmask_strategies.ensemble_isolation import EnsembleIsolation
from oracles import CONFIGS, SHAPE, WINDOW, make_model, random_request, random_words

pytestmark = pytest.mark.usefixtures("without_inductor")

STRATEGY = EnsembleIsolation()
LAYOUTS = [STRATEGY.layout(random_request(1, 3, [5, 6], 2))]


def under_a_strategy(model):
    with use_strategy(STRATEGY, LAYOUTS) as inputs:
        model(**inputs)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("jamba", "mixes tokens by other means than attention"),
        ("bamba", "mixes tokens by other means than attention"),
        ("lfm2", "mixes tokens by other means than attention"),
        ("qwen3_next", "mixes tokens by other means than attention"),
        ("mamba", "computes attention in code of its own"),
        ("llama4_text", "attend in chunks"),
        ("bart", "numbers tokens by itself"),
        ("camembert", "does not number positions from 0"),
        ("gpt_oss", "asks for attention with s_aux"),
        ("deepseek_v32", "takes a part of an attention mask|asks for attention with indices"),
        ("xglm", "load it with attn_implementation='flexmask_dense'"),
    ],
)
def test_a_model_that_a_mask_cannot_govern_is_refused_in_both_ways(family, reason, tokenizer):
    model = small_model(family)
    with pytest.raises(AttentionError, match=reason) as refused:
        under_a_strategy(model)
    assert "\n" not in str(refused.value)
    with pytest.raises(AttentionError, match=reason):
        Engine(model, tokenizer)


def test_an_encoder_is_refused_and_its_decoder_is_not(tokenizer):
    with pytest.raises(AttentionError, match="lets tokens see later ones"):
        Engine(small_model("bert", is_decoder=False), tokenizer)
    Engine(small_model("bert"), tokenizer)


def test_modules_that_attend_twice_run_under_use_strategy_and_not_in_the_engine(tokenizer):
    model = small_model("diffllama")
    under_a_strategy(model)
    with pytest.raises(AttentionError, match="DiffLlamaAttention attends more than once"):
        Engine(model, tokenizer)


def test_a_strategy_that_no_model_attends_under_is_an_error(models):
    with (
        pytest.raises(AttentionError, match="no model attended through flexmask"),
        use_strategy(STRATEGY, LAYOUTS),
    ):
        pass
    with pytest.raises(AttentionError, match="attends by 'sdpa'; load it with"):
        under_a_strategy(models("llama", "sdpa"))


def test_what_goes_wrong_inside_a_strategy_is_not_hidden():
    with pytest.raises(ZeroDivisionError), use_strategy(STRATEGY, LAYOUTS):
        raise ZeroDivisionError


def test_a_model_is_looked_at_once_and_keeps_its_training_flags(models, monkeypatch):
    model = make_model("llama", "flexmask")
    model.model.layers[0].train()
    seen = []

    def recorded(model):
        seen.append(model)
        return probe_model(model)

    monkeypatch.setattr("flexmask.attention.strategy_context.probe_model", recorded)
    for _ in range(2):
        under_a_strategy(model)
    assert seen == [model]
    assert model.model.layers[0].training
    assert not model.model.layers[1].training


def test_the_probe_finds_windows_where_the_model_uses_them():
    assert probe_model(make_model("llama", "flexmask")).windows_by_layer_type() == {
        WHOLE_MODEL: None
    }
    assert probe_model(make_model("mistral", "flexmask")).windows_by_layer_type() == {
        WHOLE_MODEL: WINDOW
    }
    assert probe_model(make_model("gemma2", "flexmask")).windows_by_layer_type() == {
        "full_attention": None,
        "sliding_attention": WINDOW,
    }


def test_a_window_that_the_model_does_not_use_is_not_used_by_the_engine():
    config = copy.deepcopy(CONFIGS["llama"])
    config.sliding_window = 8
    register_attention()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flexmask").eval()
    assert probe_model(model).windows_by_layer_type() == {WHOLE_MODEL: None}


LONG_ROPE = Phi3Config(
    **SHAPE | {"max_position_embeddings": 512},
    original_max_position_embeddings=64,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 6.0, 8.0, 16.0],
        "original_max_position_embeddings": 64,
    },
)
DYNAMIC = LlamaConfig(
    **SHAPE | {"max_position_embeddings": 64},
    rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
)


@pytest.fixture(params=[LONG_ROPE, DYNAMIC], ids=["longrope", "dynamic"])
def stretched_model(request):
    register_attention()
    config = copy.deepcopy(request.param)
    config.head_dim = 8
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flexmask")
    return model.eval().requires_grad_(False)


def test_rows_that_would_change_the_rotations_of_others_are_refused_one_by_one(
    stretched_model, tokenizer
):
    assert rotation_limit(stretched_model.config) == 64
    engine = Engine(stretched_model, tokenizer)
    short = Request((random_words(1, 20),), suffix="t9", uuid="short")
    long = Request((random_words(2, 70),), suffix="t9", uuid="long")
    edge = Request((random_words(3, 55),), suffix="t9", uuid="edge")  # its new tokens cross it
    refused = []
    run = engine.generate(
        [short, long, edge],
        Causal(),
        max_new_tokens=10,
        on_refused=lambda request, error: refused.append((request.uuid, str(error))),
    )
    (generation,) = run
    assert [uuid for uuid, _ in refused] == ["long", "edge"]
    assert "but the model's context is 64" in refused[0][1]
    with pytest.raises(RequestError, match="needs positions up to"):
        engine.generate([edge], Causal(), max_new_tokens=10)
    stretched_model.set_attn_implementation("eager")
    prompt = tokenizer(f"{short.segments[0]} {short.suffix}", return_tensors="pt")
    alone = stretched_model.generate(**prompt, max_new_tokens=10, do_sample=False)
    assert list(generation.token_ids) == alone[0, prompt["input_ids"].shape[1] :].tolist()


def test_a_batch_under_model_generate_stops_where_rotations_would_change(stretched_model):
    layouts = [Causal().layout(random_request(n, 0, [size], 2)) for n, size in ((1, 20), (2, 80))]
    for rows in (layouts[:1], layouts[1:]):
        with use_strategy(Causal(), rows) as inputs:
            stretched_model(**inputs)
    with (
        pytest.raises(AttentionError, match="changes the rotary embeddings of all rows"),
        use_strategy(Causal(), layouts) as inputs,
    ):
        stretched_model(**inputs)


def test_attention_refuses_every_argument_that_it_does_not_know():
    query = torch.zeros(1, 1, 2, 16)
    mask = create_block_mask(causal, 1, None, 2, 2, "cpu")
    for name in ("block_indices", "indices", "sinks", "s_aux", "position_bias", "something_new"):
        unknown: dict[str, Any] = {name: torch.zeros(1)}
        with pytest.raises(AttentionError, match=f"asks for attention with {name}"):
            flexmask_attention(torch.nn.Linear(1, 1), query, query, query, mask, **unknown)
    with torch.no_grad():
        flexmask_attention(
            torch.nn.Linear(1, 1), query, query, query, mask, sinks=None, is_causal=True
        )


def test_a_mask_answers_what_model_code_asks_of_a_tensor():
    mask = ModelBlockMask.of(create_block_mask(causal, 2, None, 5, 7, "cpu"))
    assert (mask.ndim, mask.dim(), mask.size(), mask.size(-1)) == (4, 4, (2, 1, 5, 7), 7)
    assert mask.dtype == torch.bool
    assert mask[:, :, :, :7] is mask[..., :] is mask.contiguous() is ModelBlockMask.of(mask)
    for part in ((slice(None), 0), (..., slice(0, 3)), (slice(None),) * 5):
        with pytest.raises(AttentionError, match="takes a part of an attention mask"):
            mask[part]
    assert mask.to("cpu").shape == mask.shape
    for dtype in (torch.bool, torch.float16):  # BlockMask would convert its indices
        with pytest.raises(OwnScoresError, match="masks scores in code of its own"):
            mask.to(dtype)


def test_gradients_on_a_cpu_are_refused_in_one_line():
    model = make_model("llama", "flexmask").requires_grad_(True)
    with pytest.raises(AttentionError, match="no gradients on a CPU; run the model under"):
        model(torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("moshi", "cache has dropped keys that a layer without a window still sees"),
        ("dory", "under a mask made for"),
    ],
)
def test_a_cache_that_does_not_hold_what_the_mask_is_for_is_refused(family, reason):
    known(family)
    checks = families.check_family(family)
    assert checks[0]["state"] == "unavailable"
    assert reason in checks[0]["detail"]


@pytest.mark.parametrize(
    "family",
    ["gpt2", "opt", "gptj", "gemma4_text", "qwen3_moe", "deepseek_v3", "cohere2"],
)
def test_families_of_every_kind_give_what_their_own_attention_gives(family):
    known(family)
    outcomes = families.check_family(family)
    assert all(outcome["state"] == "ok" for outcome in outcomes), outcomes


@pytest.mark.long
@pytest.mark.parametrize("family", families.all_families())
def test_no_family_is_wrong_or_ends_in_a_traceback(family):
    try:
        outcomes = families.check_family(family)
    except families.NotSmallError as error:
        pytest.skip(str(error))
    assert all(outcome["state"] != "broken" for outcome in outcomes)
