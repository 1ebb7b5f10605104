"""Models that mask scores in code of their own, under the dense reference: XGLM and others."""

import shutil

import pytest
import torch
from torch import nn
from transformers import XGLMConfig
from transformers.models.xglm.modeling_xglm import XGLMAttention, XGLMForCausalLM

from family_models import small_model
from flexmask.attention.added_mask import OwnScoresError, added_mask, seen_through
from flexmask.attention.backend import dense_attention
from flexmask.attention.model_probe import probe_model
from flexmask.attention.strategy_context import use_strategy
from flexmask.demo import model_path
from flexmask.doctor.model_checks import BACKEND_NAME, DENSE_NAME, ENGINE_NAME, load_and_check
from flexmask.engine import Engine
from flexmask.errors import AttentionError
from flexmask_strategies.causal import Causal
from flexmask_strategies.ensemble_isolation import EnsembleIsolation
from flexmask_strategies.prefix_segment import PrefixSegment
from oracles import oracle_tokens, random_request

NEW_TOKENS = 8
FAMILIES = ["xglm", "gpt_neox_japanese"]
LAYOUT = EnsembleIsolation().layout(random_request(1, 6, [9, 5, 7], 2))


def own_scores_model(family="xglm", implementation="flexmask_dense", dtype=torch.float32):
    """A small model of random weights, the same for every implementation."""
    model = small_model(family, implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.15)  # larger than usual: attention has to matter
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype)


def generate(model, inputs, **options):
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return tokens[:, -NEW_TOKENS:].tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_causal_gives_the_tokens_of_eager_attention(family, dtype, cache):
    layouts = [Causal().layout(random_request(n, 3, [9 * n], 2)) for n in (1, 3)]
    model = own_scores_model(family, dtype=dtype)
    options = dict(cache_implementation=cache, disable_compile=True)
    with use_strategy(Causal(), layouts) as inputs:
        got = generate(model, inputs, **options)
    want = generate(own_scores_model(family, "eager", dtype), inputs, **options)
    assert got == want == generate(model, inputs, **options)
    assert got[0] != got[1]


@pytest.mark.parametrize("strategy", [PrefixSegment(), EnsembleIsolation()], ids=lambda s: s.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_strategy_generates_what_its_oracle_says(family, strategy):
    requests = [random_request(1, 9, [20, 31, 15], 2), random_request(2, 14, [40, 12], 1)]
    layouts = [strategy.layout(request) for request in requests]
    with use_strategy(strategy, layouts) as inputs:
        tokens = generate(own_scores_model(family), inputs)
    reference = own_scores_model(family, "eager")
    for row, layout in zip(tokens, layouts, strict=True):
        want, _ = oracle_tokens(reference, strategy, layout, NEW_TOKENS)
        assert tuple(row) == want


def test_each_segment_is_what_it_is_alone():
    model, reference = own_scores_model(), own_scores_model(implementation="eager")
    with use_strategy(EnsembleIsolation(), [LAYOUT]) as inputs:
        logits = model(**inputs).logits[0]
    segments = LAYOUT.segment_tensor
    for segment in segments[segments > 0].unique():
        slots = (segments == segment).nonzero().flatten()
        shared = (segments == 0).nonzero().flatten()
        seen = torch.cat((shared[shared < slots[0]], slots))
        alone = reference(
            input_ids=inputs["input_ids"][:, seen], position_ids=inputs["position_ids"][:, seen]
        ).logits[0]
        assert torch.allclose(logits[slots], alone[-len(slots) :], atol=1e-5)


def test_plain_flexmask_and_the_engine_refuse_it_and_name_the_way_that_works(tokenizer):
    model = own_scores_model(implementation="flexmask")
    names_it = "code of its own.*attn_implementation='flexmask_dense'"
    with pytest.raises(AttentionError, match=names_it), use_strategy(Causal(), [LAYOUT]) as inputs:
        model(**inputs)
    with pytest.raises(AttentionError, match=names_it):
        Engine(model, tokenizer)
    with pytest.raises(OwnScoresError, match=names_it):  # without a strategy, too
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2)
    with pytest.raises(AttentionError, match=r"use flexmask.use_strategy with model.generate"):
        Engine(own_scores_model(), tokenizer)


def causal_besides(forward, module, hidden_states, attention_mask, **kwargs):
    """Hide later slots whatever the mask says, as GPT-Neo's buffer does."""
    slots = torch.arange(hidden_states.shape[1])
    later = added_mask(slots <= slots[:, None], hidden_states.dtype)
    return forward(module, hidden_states, attention_mask=attention_mask + later, **kwargs)


def weighed_by_distance(forward, module, hidden_states, attention_mask, **kwargs):
    """Weigh keys by the distance of their slots, on both sides alike."""
    slots = torch.arange(hidden_states.shape[1])
    bias = -0.5 * (slots - slots[:, None]).abs()
    return forward(module, hidden_states, attention_mask=attention_mask + bias, **kwargs)


def without_the_mask(forward, module, hidden_states, attention_mask, **kwargs):
    """Let the last layer see everything."""
    mask = attention_mask if module.layer_idx == 0 else None
    return forward(module, hidden_states, attention_mask=mask, **kwargs)


def themselves_alone(forward, module, hidden_states, attention_mask, **kwargs):
    """Let tokens see nothing but themselves."""
    itself = torch.eye(hidden_states.shape[1], dtype=torch.bool)
    mask = added_mask(itself, hidden_states.dtype).expand_as(attention_mask)
    return forward(module, hidden_states, attention_mask=mask, **kwargs)


def the_mask_of_one_row(forward, module, hidden_states, attention_mask, **kwargs):
    """Take the first row's mask for all rows."""
    mask = attention_mask[:1].expand_as(attention_mask)
    return forward(module, hidden_states, attention_mask=mask, **kwargs)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (causal_besides, "hides or weighs tokens by their slots"),
        (weighed_by_distance, "hides or weighs tokens by their slots"),
        (without_the_mask, "mixes tokens by other means than attention"),
        (themselves_alone, "does not attend under the mask that it is given"),
        (the_mask_of_one_row, "does not attend under the mask that it is given"),
    ],
)
@pytest.mark.parametrize("implementation", ["flexmask", "flexmask_dense"])
def test_a_mask_that_does_not_decide_alone_is_refused(monkeypatch, fault, reason, implementation):
    model, forward = own_scores_model(implementation=implementation), XGLMAttention.forward

    def changed(module, hidden_states, attention_mask, **kwargs):
        if not isinstance(attention_mask, torch.Tensor):  # of the pass that finds its own scores
            return forward(module, hidden_states, attention_mask=attention_mask, **kwargs)
        return fault(forward, module, hidden_states, attention_mask, **kwargs)

    monkeypatch.setattr(XGLMAttention, "forward", changed)
    with pytest.raises(AttentionError, match=reason):
        probe_model(model)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_families_that_weigh_by_slots_are_refused_under_the_dense_reference(family):
    with pytest.raises(AttentionError, match="hides or weighs tokens by their slots"):
        probe_model(own_scores_model(family))


def test_a_mask_in_either_form_gives_the_same_attention():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    is_seen = (torch.rand(2, 1, 5, 5) < 0.5).tril()
    want, _ = dense_attention(nn.Module(), query, key, value, is_seen)
    infinite = torch.zeros(is_seen.shape).masked_fill(~is_seen, float("-inf"))
    for mask in (infinite, *(added_mask(is_seen, d) for d in (torch.float32, torch.float16))):
        assert torch.equal(dense_attention(nn.Module(), query, key, value, mask)[0], want)
    with pytest.raises(AttentionError, match="adds more than a mask to scores"):
        seen_through(added_mask(is_seen, torch.float32) - 0.5)
    with pytest.raises(AttentionError, match="5 queries to 5 keys under a mask made for 5 and 1;"):
        dense_attention(nn.Module(), query, key, value, is_seen[..., :1])


@pytest.fixture
def folder(tmp_path):
    model = XGLMForCausalLM(
        XGLMConfig(
            vocab_size=2048, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4,
            max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )
    )  # fmt: skip
    shutil.copytree(model_path(), tmp_path / "model")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (tmp_path / "model" / name).unlink(missing_ok=True)
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_doctor_says_which_way_is_right(folder):
    checks = load_and_check(folder, "cpu", "float32", trust_remote_code=False)
    states = {check.name: check.state for check in checks}
    assert states == {BACKEND_NAME: "unavailable", ENGINE_NAME: "unavailable", DENSE_NAME: "ok"}
    with pytest.raises(AttentionError, match="if `flexmask doctor --model` finds that right"):
        Engine.from_pretrained(folder, device="cpu")
