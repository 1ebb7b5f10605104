"""LoRA adapters: merged they are the model that peft runs unmerged, or refused in one line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from command import run_command
from flexmask.checkpoint import model_name
from flexmask.checkpoint.adapter import merge_adapter
from flexmask.checkpoint.identity import model_files
from flexmask.demo import model_path
from flexmask.engine import Engine
from flexmask.engine.model_loading import load_model
from flexmask.errors import KVStoreError, ModelError
from flexmask.kernels.rounded_linear import rounded_rows
from flexmask.kv_store.options import KVCacheOptions
from flexmask.request import Request

BASE = str(model_path())
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.arange(10, 90, 3)[None]


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def save_adapter(folder: Path, seed: int = 0, **options: Any) -> Path:
    """Write an adapter whose every tensor is random, so that all of them matter."""
    options = {"target_modules": PROJECTIONS, "r": 4, "lora_alpha": 8} | options
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", **options))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        wrapped.save_pretrained(folder)
    return folder


def unmerged(adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base_model(), str(adapter)).eval()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "lora")


@pytest.fixture
def refusal(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Loads the bundled model with an adapter, which must be refused in one line."""

    def get(adapter: Path, model: str = BASE) -> str:
        capfd.readouterr()
        with pytest.raises(ModelError) as caught:
            Engine.from_pretrained(model, device="cpu", adapter=str(adapter))
        message = str(caught.value)
        assert len(message) <= 250
        assert "\n" not in message
        assert capfd.readouterr() == ("", "")
        return message

    return get


def configure(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(
    adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)


def loaded(adapter: Path) -> PreTrainedModel:
    device = torch.device("cpu")
    model, _ = load_model(BASE, device=device, dtype="float32", adapter=str(adapter))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"q_proj": 2}, "use_rslora": True, "layers_to_transform": [0, 2]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [10, 13]},
    ],
    ids=str,
)
def test_a_merged_adapter_computes_what_peft_computes_unmerged(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    adapter = save_adapter(tmp_path / "lora", **options)
    model = loaded(adapter)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = unmerged(adapter)(TOKENS).logits
        found = model(TOKENS).logits
        plain = base_model()(TOKENS).logits
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_merged_model_is_one_of_plain_modules_without_gradients(adapter: Path) -> None:
    model: Any = loaded(adapter)
    assert {type(m) for m in model.modules()} == {type(m) for m in base_model().modules()}
    assert not any(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")


def test_the_engine_generates_the_tokens_of_the_adapted_model(
    adapter: Path, without_inductor: None
) -> None:
    request = Request(("Q: Where was Ada born?",), suffix="\nA:")

    def tokens(engine: Engine) -> list[int]:
        (generation,) = engine.generate([request], "causal", max_new_tokens=6)
        return list(generation.token_ids)

    engine = Engine.from_pretrained(BASE, device="cpu", adapter=str(adapter))
    prompt = engine.tokenizer("Q: Where was Ada born?\nA:", return_tensors="pt")
    reference = unmerged(adapter).generate(**prompt, max_new_tokens=6, do_sample=False)
    expected = reference[0, prompt["input_ids"].shape[1] :].tolist()
    assert tokens(engine) == expected
    assert tokens(Engine.from_pretrained(BASE, device="cpu")) != expected


def test_an_adapter_of_another_model_of_the_hub_is_refused_by_name(adapter) -> None:
    configure(adapter, base_model_name_or_path="org/other")
    message = "was made for model 'org/other', not 'org/model'; if both have the same weights"
    with pytest.raises(ModelError, match=message):
        merge_adapter(base_model(), str(adapter), "org/model")
    assert loaded(adapter)  # a folder's name does not say which model is in it


def test_an_adapter_of_other_shapes_is_refused_with_both(adapter, refusal) -> None:
    change_weights(adapter, lambda w: {k: v[:, :64] if "lora_A" in k else v for k, v in w.items()})
    message = refusal(adapter)
    assert "weights are of another shape (base_model.model.model.layers.0." in message
    assert "4×64, not 4×800" in message


def test_an_adapter_that_lacks_weights_or_has_others_is_refused(adapter, refusal) -> None:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    change_weights(adapter, lambda w: {k: v for k, v in w.items() if k != name})
    assert "1 weight is missing (" in refusal(adapter)
    added = {name.replace("layers.1", "layers.9"): torch.ones(4, 4)}
    change_weights(adapter, lambda w: w | {name: torch.ones(384, 4)} | added)
    assert "1 weight is unknown to this model (" in refusal(adapter)
    configure(adapter, target_modules=["qkv_proj"])
    assert "Target modules" in refusal(adapter)


def test_only_lora_is_merged(tmp_path, refusal) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(base_model(), config).save_pretrained(tmp_path)
    assert "is of type 'PROMPT_TUNING'; flexmask merges LORA only" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", "{", "adapter_config.json of model"),
        ("adapter_model.safetensors", "", "is damaged or not whole"),
        ("adapter_config.json", None, "has no adapter_config.json"),
        (
            "adapter_model.safetensors",
            None,
            "has no adapter_model.safetensors; flexmask loads saf",
        ),
    ],
)
def test_a_folder_that_is_no_whole_adapter_is_refused(
    adapter, refusal, name, content, message
) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"pickled")
    if content is None:
        (adapter / name).unlink()
    else:
        (adapter / name).write_text(content)
    assert message in refusal(adapter)


def test_without_peft_an_adapter_is_refused_with_what_to_install(
    adapter, refusal, monkeypatch
) -> None:
    monkeypatch.setattr(model_name, "find_spec", lambda name: None)
    assert refusal(adapter).endswith("run: pip install 'flexmask[adapters]'")
    assert refusal(adapter / "nowhere").endswith("nowhere' does not exist")


def test_an_adapter_cannot_be_merged_into_quantised_weights(adapter, refusal, monkeypatch) -> None:
    monkeypatch.setattr("flexmask.engine.model_loading.quantization_of", lambda config: "gptq")
    assert "cannot be merged into model" in (message := refusal(adapter))
    assert message.endswith("which is quantised by gptq; load one that is not quantised")


def test_an_adapter_is_merged_before_weights_are_rounded(adapter: Path) -> None:
    options: Any = {"device": torch.device("cpu"), "dtype": "float32", "adapter": str(adapter)}
    rounded, _ = load_model(BASE, **options, quantize="int8")
    name = "model.layers.0.self_attn.q_proj"
    found: Any = rounded.get_submodule(name)
    merged: Any = loaded(adapter).get_submodule(name)
    digits, scale = rounded_rows(merged.weight, torch.int8)
    assert torch.equal(found.weight, digits)
    assert torch.equal(found.scale, scale)


def test_another_adapter_is_another_model(tmp_path: Path, adapter: Path) -> None:
    other = save_adapter(tmp_path / "other", seed=1)
    files = [model_files(BASE, str(each)) for each in (adapter, other)]
    changed = {name for name in files[0] if files[0][name] != files[1][name]}
    assert changed == {"adapter/adapter_model.safetensors"}
    assert files[0].keys() - model_files(BASE).keys() == {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
    }  # fmt: skip
    cache = KVCacheOptions(folder=tmp_path / "cache")
    for _ in range(2):
        Engine.from_pretrained(BASE, device="cpu", adapter=str(adapter), kv_cache=cache).close()
    with pytest.raises(KVStoreError, match=r"adapter/adapter_model\.safetensors"):
        Engine.from_pretrained(BASE, device="cpu", adapter=str(other), kv_cache=cache)


def test_results_of_an_adapter_are_not_resumed_with_another(
    tmp_path, adapter, without_inductor, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = save_adapter(tmp_path / "other", seed=1)
    command = ["generate", "--limit", "1", "--max-new-tokens", "2", "--device", "cpu"]
    assert run_command(*command, "--adapter", "lora", "--quiet").status == 0
    (result,) = Path("outputs").rglob("*.feather")
    assert result.parent.name.endswith("+lora")
    again = [*command, "--resume", "--output", result]
    assert "adapter: 'lora' → " in run_command(*again, "--adapter", other).error
    assert "adapter: 'lora' → not set" in run_command(*again).error


def test_a_wrong_adapter_is_told_before_anything_is_loaded() -> None:
    outcome = run_command("generate", "--adapter", "nowhere")
    assert outcome.error == "error: adapter folder 'nowhere' does not exist"
