"""``quantize``: weights of 8 bits with a scale for each row, rounded at loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from command import run_command
from flexmask.checkpoint.identity import model_files
from flexmask.demo import model_path
from flexmask.doctor.model_checks import load_and_check
from flexmask.engine import Engine
from flexmask.engine.model_loading import load_model
from flexmask.errors import KVStoreError, ModelError, OptionError
from flexmask.kernels.linear_weights import DENSE, kinds_of_projections
from flexmask.kernels.rounded_linear import RoundedLinear, round_linear_layers, rounded_rows
from flexmask.kv_store.options import KVCacheOptions
from flexmask.request import Request
from oracles import make_model
from quantised_models import TOKENS, fused_launches

BASE = str(model_path())
CPU = torch.device("cpu")
FLOAT8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
NUMBERS = {"int8": torch.arange(-127, 128.0), "fp8": FLOAT8[FLOAT8.isfinite()].unique()}
"""All numbers that a row may hold before it is scaled."""


def unpacked(rounded: Any, quantize: str) -> Any:
    """The model as transformers loads it, with a rounded model's weights as they unpack.

    Its entries must be nearest to those before of all numbers times the scale, which brings the
    largest of a row to the largest number.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    numbers = NUMBERS[quantize].double()
    between = (numbers[1:] + numbers[:-1]) / 2
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            other = rounded.get_submodule(name)
            weight, digits, scale = (t.double() for t in (layer.weight, other.weight, other.scale))
            expected = weight.abs().amax(1, keepdim=True) / numbers[-1]
            torch.testing.assert_close(scale, expected, atol=0.0, rtol=1e-6)
            nearest = numbers[torch.searchsorted(between, weight / scale)]
            distances = ((weight / scale - each).abs() for each in (digits, nearest))
            torch.testing.assert_close(*distances, atol=1e-4, rtol=0.0)
            layer.weight.data = (digits * scale).float()
    return model


@pytest.mark.parametrize("quantize", NUMBERS)
def test_a_rounded_model_computes_what_its_unpacked_weights_compute(
    quantize: str, without_inductor: None
) -> None:
    engine = Engine.from_pretrained(BASE, device="cpu", dtype="float32", quantize=quantize)
    plain = unpacked(engine.model, quantize)
    request = Request(("Q: Where was Ada born?",), suffix="\nA:")
    (generation,) = engine.generate([request], "causal", max_new_tokens=6)
    prompt = engine.tokenizer("Q: Where was Ada born?\nA:", return_tensors="pt")
    expected = plain.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert list(generation.token_ids) == expected[0, prompt["input_ids"].shape[1] :].tolist()
    engine.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        found, expected = engine.model(TOKENS).logits, plain(TOKENS).logits
        unrounded = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - unrounded).abs().max() > 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", NUMBERS)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_on_a_gpu_rounded_weights_give_the_tokens_of_a_cpu(quantize: str, batch_size: int) -> None:
    requests = [
        Request((f"Q: Where was {name} born?",), suffix="\nA:", uuid=name)
        for name in ("Ada", "Bob", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
    ]
    tokens = []
    for device in ("cpu", "cuda"):
        engine = Engine.from_pretrained(BASE, device=device, dtype="float32", quantize=quantize)
        run = engine.generate(requests, "causal", max_new_tokens=6, batch_size=batch_size)
        tokens.append([generation.token_ids for generation in run])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("quantize", NUMBERS)
def test_doctor_finds_a_rounded_model_right(quantize: str, without_inductor: None) -> None:
    checks = load_and_check(BASE, "cpu", "float32", trust_remote_code=False, quantize=quantize)
    assert [check.state for check in checks] == ["ok", "ok"], checks


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_each_row_is_rounded_by_its_own_scale_and_zeros_stay_zeros(dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [3e38, -1.0], [1e-45, 0.0]])
    digits, scale = rounded_rows(weight.bfloat16(), dtype)
    expected = weight.bfloat16().float() * torch.tensor(
        [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0, 0]]
    )
    torch.testing.assert_close(digits.float() * scale, expected, atol=0.0, rtol=1e-6)
    assert scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_projections_of_rounded_layers_are_fused_as_dense_ones(dtype: torch.dtype) -> None:
    model: Any = make_model("qwen2", "eager")  # has biases
    assert round_linear_layers(model, model.lm_head, dtype, CPU) == 14
    layer = model.model.layers[0]
    assert fused_launches(layer) == 4  # queries, keys and values; output; gate and up; down


def test_a_rounded_model_keeps_one_byte_for_a_weight_and_no_copy() -> None:
    model, _ = load_model(BASE, device=CPU, dtype="bfloat16", quantize="int8")
    plain, _ = load_model(BASE, device=CPU, dtype="bfloat16")
    layers = [module for module in model.modules() if isinstance(module, RoundedLinear)]
    saved = sum(layer.weight.numel() - 4 * len(layer.scale) for layer in layers)
    sizes = [sum(p.numel() * p.itemsize for p in m.parameters()) for m in (model, plain)]
    assert sizes[1] - sizes[0] == saved
    assert model.dtype == torch.bfloat16
    assert kinds_of_projections(model) == {("rounded to int8", True): 35, (DENSE, True): 1}


@pytest.mark.parametrize(
    ("quantize", "error", "message"),
    [
        ("int4", OptionError, "quantize must be int8 or fp8, got 'int4'; did you mean 'int8'?"),
        (
            "int8",
            ModelError,
            "is quantised by gptq and cannot be rounded to int8; leave out `quan",
        ),
    ],
)
def test_what_cannot_be_rounded_is_refused(monkeypatch, quantize, error, message) -> None:
    monkeypatch.setattr("flexmask.engine.model_loading.quantization_of", lambda config: "gptq")
    with pytest.raises(error) as caught:
        Engine.from_pretrained(BASE, device="cpu", quantize=quantize)
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 250


def test_float8_is_refused_on_a_gpu_that_does_not_convert_it(monkeypatch) -> None:
    from flexmask.device import resolve_quantize

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert resolve_quantize("int8", torch.device("cuda")) == torch.int8
    with pytest.raises(OptionError, match=r"compute capability 8\.9 or later .* got 8\.0"):
        resolve_quantize("fp8", torch.device("cuda"))


def test_models_without_linear_layers_and_with_infinite_weights_are_refused(tmp_path) -> None:
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    assert round_linear_layers(GPT2LMHeadModel(config).transformer, None, torch.int8, CPU) == 0
    model: Any = make_model("llama", "eager")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.inf
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight holds"):
        round_linear_layers(model, model.lm_head, torch.int8, CPU)


def test_rounded_weights_are_another_model(tmp_path: Path) -> None:
    rounded = [model_files(BASE, quantize=quantize) for quantize in NUMBERS]
    assert rounded[0].items() - rounded[1].items() == {("quantize", "int8")}
    cache = KVCacheOptions(folder=tmp_path / "cache")
    Engine.from_pretrained(BASE, device="cpu", quantize="int8", kv_cache=cache).close()
    with pytest.raises(KVStoreError, match="quantize"):
        Engine.from_pretrained(BASE, device="cpu", kv_cache=cache)


def test_results_of_rounded_weights_are_not_resumed_with_others(
    tmp_path, without_inductor, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["generate", "--limit", "1", "--max-new-tokens", "2", "--device", "cpu"]
    outcome = run_command(*command, "--quantize", "int8", "--verbose")
    assert outcome.status == 0
    assert (
        "projections: 35 with weights in 8 bits (rounded to int8), unpacked for every product, "
        "1 with dense weights"
    ) in outcome.err
    (result,) = Path("outputs").rglob("*.feather")
    assert result.parent.name.endswith("+int8")
    again = [*command, "--resume", "--output", result]
    assert "quantize: 'int8' → 'fp8'" in run_command(*again, "--quantize", "fp8").error
    assert "quantize: 'int8' → not set" in run_command(*again).error


def test_a_wrong_rounding_is_told_before_anything_is_loaded() -> None:
    outcome = run_command("generate", "--quantize", "int7")
    assert outcome.error == "error: quantize must be int8 or fp8, got 'int7'; did you mean 'int8'?"
