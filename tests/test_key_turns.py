"""Keys turned to other positions are those computed there; models where they are not say so."""

import pytest
import torch

from family_models import small_model
from flexmask.attention.key_turns import KeyTurn, key_turns
from flexmask.attention.model_probe import attention_calls, probe_model

TOKENS = ((9, 8, 7, 6),) * 2
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 6.0, 8.0, 16.0],
    "original_max_position_embeddings": 64,
}


def rope(rope_type, **values):
    return {"rope_type": rope_type, "rope_theta": 10000.0} | values


def scaled(rope_parameters):
    return {"rope_parameters": rope_parameters, "max_position_embeddings": 131072}


def keys_and_turned(model, old, new):
    """Keys ``(H_kv, N, D)`` of each layer at new positions, and those of old positions turned."""
    turns = key_turns(probe_model(model))
    assert turns.reason is None
    for call in attention_calls(model, TOKENS, (old, new)):
        turn = turns.by_module[call.module]
        angles = turn.angles(torch.tensor(old), torch.tensor(new))
        yield call.tensors[1][1], turn.turn(call.tensors[1][0], angles)


@pytest.mark.parametrize(
    ("family", "changes", "kinds"),
    [
        ("llama", {}, 1),
        ("llama", scaled(LLAMA3), 1),
        ("llama", scaled(YARN), 1),
        ("qwen2", scaled(rope("linear", factor=4.0)), 1),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}, 2),
        ("gpt_neox", {}, 1),  # a quarter of the dimensions rotates
        ("glm", {}, 1),  # half of the dimensions rotate, in neighbouring pairs
        ("cohere2", {"layer_types": ["sliding_attention", "full_attention"]}, 2),  # one without
        ("deepseek_v3", {}, 1),  # the last dimensions rotate
    ],
    ids=lambda value: (
        value.get("rope_parameters", {}).get("rope_type", "")
        if isinstance(value, dict)
        else str(value)
    ),
)
def test_turned_keys_are_those_computed_at_the_new_positions(family, changes, kinds):
    model = small_model(family, **changes)
    last = model.config.max_position_embeddings - 1
    moves = ((0, 3, last, last // 3), (last, 3, 5, last // 2))
    for old, new in (moves, moves[::-1]):
        for computed, turned in keys_and_turned(model, old, new):
            atol = 1e-5 * float(computed.norm(dim=-1).max())
            torch.testing.assert_close(turned, computed, rtol=0, atol=atol)
    assert len({id(turn) for turn in key_turns(probe_model(model)).by_module.values()}) == kinds


def test_turned_keys_in_bfloat16_differ_by_a_hundredth_of_their_length_at_most():
    frequencies = small_model("llama", **scaled(LLAMA3)).model.rotary_emb.inv_freq
    model = small_model("llama", **scaled(LLAMA3)).to(torch.bfloat16)
    model.model.rotary_emb.inv_freq = frequencies  # as in a model that was loaded in bfloat16
    for computed, turned in keys_and_turned(model, (0, 1, 700, 9000), (8000, 513, 3, 100000)):
        assert turned.dtype == torch.bfloat16
        error = (turned.float() - computed.float()).abs().amax(-1)
        assert (error <= 0.01 * computed.float().norm(dim=-1)).all()
        assert error.any()


def test_turning_leaves_the_keys_as_they_were_and_takes_any_leading_dimensions():
    turn = KeyTurn(torch.tensor([1.0, 0.1]), first_dim=1)
    keys = torch.randn(3, 2, 5, 6)
    before, positions = keys.clone(), torch.arange(5)
    turned = turn.turn(keys, turn.angles(positions, positions + 40))
    assert torch.equal(keys, before)
    assert torch.equal(turned[..., [0, 5]], keys[..., [0, 5]])
    back = turn.turn(turned, turn.angles(positions + 40, positions))
    torch.testing.assert_close(back, keys, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt2", {}, "depend on positions"),
        ("llama", {"rope_parameters": rope("dynamic", factor=4.0)}, "on the length of a row"),
        ("phi3", {"rope_parameters": LONGROPE}, "on the length of a row"),
        ("llama", {"rope_parameters": rope("default", mrope_section=[2, 1, 1])}, "several posit"),
        # Queries grow with their position, above the original context.
        (
            "ministral3",
            {
                "rope_parameters": rope(
                    "default", llama_4_scaling_beta=0.1, original_max_position_embeddings=64
                )
            },
            "no rotary embedding of Ministral3ForCausalLM turns",
        ),
    ],
    ids=["learned", "dynamic", "longrope", "mrope", "scaled queries"],
)
def test_a_model_whose_keys_cannot_be_turned_says_why(family, changes, reason):
    turns = key_turns(probe_model(small_model(family, **changes)))
    assert reason in str(turns.reason)
    assert not turns.by_module


def test_frequencies_that_the_model_does_not_use_are_not_believed(monkeypatch):
    model = small_model("llama")
    rotary = model.model.rotary_emb
    forward = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: forward(x, 2 * position_ids))
    assert "no rotary embedding" in str(key_turns(probe_model(model)).reason)
