"""Floors of a run, from its counts and the rates of a machine."""

import pytest
from torch import nn

from family_models import small_model
from flexmask.bench.floors import ModelCost, Rates
from flexmask.engine import RunStats
from oracles import make_model

COST = ModelCost(
    weight_bytes=1_000, slot_bytes=10, token_flops=500, logits_flops=300, pair_flops=0,
    last_token_flops=100, last_pair_flops=0,
)  # fmt: skip
RATES = Rates(bytes_per_s=1e4, flops_per_s=1e4)


def test_a_phase_takes_at_least_as_long_as_reading_or_as_computing():
    few = RunStats(
        1, 512, prefills=2, computed_tokens=3, decode_steps=4, used_row_steps=4, keys_read=100,
        prefill_s=0.4, decode_s=1.0,
    )  # fmt: skip
    assert COST.shares_of(few, RATES) == pytest.approx({"prefill": 0.2 / 0.4, "decode": 0.5})
    many = RunStats(
        64, 512, prefills=2, computed_tokens=30, decode_steps=4, used_row_steps=256,
        prefill_s=2.4, decode_s=40.96,
    )  # fmt: skip
    assert COST.shares_of(many, RATES) == pytest.approx({"prefill": 0.5, "decode": 0.5})


def test_a_phase_that_did_nothing_has_no_share():
    assert COST.shares_of(RunStats(1, 512, prefills=1, prefill_s=0.1), RATES).keys() == {"prefill"}


def test_a_step_reads_all_weights_but_an_embedding_of_its_own(models):
    model = models("llama", "flexmask")
    cost = ModelCost.of(model)
    read = sum(weight.numel() for weight in model.parameters())
    if not model.config.tie_word_embeddings:
        read -= model.model.embed_tokens.weight.numel()
    assert cost.weight_bytes == 4 * read
    assert cost.token_flops + cost.logits_flops == 2 * read


def test_the_last_layer_of_a_prompt_costs_keys_and_values_alone(models):
    model = models("llama", "flexmask")
    cost, layer = ModelCost.of(model), model.model.layers[-1]
    written = layer.self_attn.k_proj.weight.numel() + layer.self_attn.v_proj.weight.numel()
    whole = sum(weight.numel() for weight in layer.parameters())
    others = cost.token_flops - 2 * whole
    assert cost.keys_flops(tokens=10) == 10 * (others + 2 * written)
    attention = cost.pair_flops * (model.config.num_hidden_layers - 1)
    attention //= model.config.num_hidden_layers
    assert cost.keys_flops(10, pairs=55) - cost.keys_flops(10) == 55 * attention


def test_the_cost_of_experts_is_not_known(models):
    assert all(ModelCost.is_known(models(name, "flexmask")) for name in ("llama", "gemma2"))
    assert not ModelCost.is_known(small_model("qwen3_moe"))


def test_the_cost_of_packed_weights_is_not_known():
    model = make_model("llama", "flexmask")
    model.model.layers[0].mlp.up_proj = nn.Bilinear(1, 1, 1)
    assert not ModelCost.is_known(model)
