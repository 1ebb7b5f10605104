"""Folders, GGUF files and hub ids of models: loaded whole, or refused in one line."""

import json
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPTNeoConfig,
    NemotronConfig,
    StableLmConfig,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from flexmask.checkpoint import model_name
from flexmask.checkpoint.transformers_calls import one_line
from flexmask.checkpoint.weights import check_loaded_weights
from flexmask.demo import model_path
from flexmask.encoding.tokenization import load_tokenizer
from flexmask.engine import Engine
from flexmask.errors import AttentionError, FlexMaskError, ModelError
from flexmask.request import Request
from flexmask.results.output_path import default_folder

CONFIG = json.loads((model_path() / "config.json").read_text())
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the bundled model, to change."""
    return Path(shutil.copytree(model_path(), tmp_path / "model"))


@pytest.fixture
def refusal(capfd) -> Callable[..., str]:
    """Loads a model, which must be refused in one line, with nothing said beside it."""

    def get(model, kind=ModelError, **options) -> str:
        capfd.readouterr()
        with pytest.raises(FlexMaskError) as caught:
            Engine.from_pretrained(str(model), device="cpu", **options)
        assert type(caught.value) is kind
        message = str(caught.value)
        assert len(message) <= 250
        assert "\n" not in message
        out, err = capfd.readouterr()
        assert (out, err) == ("", "")
        return message

    return get


def configure(folder, **values):
    (folder / "config.json").write_text(json.dumps(CONFIG | values))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def split_weights(folder, suffix):
    """Put the weights into a file that an index names."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = f"model-00001-of-00001.{suffix}"
    if suffix == "bin":
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_missing_weights_are_refused_by_name(folder, refusal):
    lost = "model.layers.1.mlp.down_proj.weight"
    change_weights(folder, lambda weights: {k: v for k, v in weights.items() if k != lost})
    assert f"1 weight is missing ({lost}); config.json and weights" in refusal(folder)


def test_an_output_layer_that_is_not_tied_must_be_there(folder, refusal):
    configure(folder, tie_word_embeddings=False)
    assert "1 weight is missing (lm_head.weight)" in refusal(folder)


def test_weights_under_another_prefix_are_refused(folder, refusal):
    change_weights(folder, lambda weights: {f"lm.{k}": v for k, v in weights.items()})
    message = refusal(folder)
    assert "48 weights are missing (" in message
    assert "47 weights are unknown to LlamaForCausalLM (lm.model.embed_tokens.weight" in message


def test_weights_of_another_shape_are_refused_with_both_shapes(folder, refusal):
    configure(folder, intermediate_size=1600)
    message = refusal(folder)
    assert "15 weights are of another shape (" in message
    assert "model.layers.0.mlp.down_proj.weight: 288×800, not 288×1600" in message


def test_layers_that_the_config_leaves_out_are_refused(folder, refusal):
    configure(folder, num_hidden_layers=3)
    assert "18 weights are unknown to LlamaForCausalLM (model.layers.3." in refusal(folder)


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj.bias", "self_attn.q_norm.weight", "self_attn.q_proj.lora_A.weight"]
)
def test_weights_that_change_tokens_and_have_no_place_are_refused(folder, refusal, name):
    added = {f"model.layers.0.{name}": torch.ones(4)}
    change_weights(folder, lambda weights: weights | added)
    assert f"1 weight is unknown to LlamaForCausalLM (model.layers.0.{name})" in refusal(folder)


def test_what_has_no_part_in_the_next_token_may_stand_in_a_checkpoint(folder):
    extra = (
        *("model.layers.0.self_attn.rotary_emb.inv_freq", "model.vision_tower.patch.weight"),
        *("visual.blocks.0.weight", "multi_modal_projector.bias", "v_head.summary.weight"),
        *("mtp.layers.0.weight", "audio_tower.conv.weight"),
    )
    change_weights(folder, lambda weights: weights | {name: torch.ones(4) for name in extra})
    assert Engine.from_pretrained(str(folder), device="cpu").model.config.model_type == "llama"


def test_up_to_five_names_stand_in_a_message_and_the_count():
    report = {
        "missing_keys": {f"w{i}" for i in range(9)}, "unexpected_keys": set(),
        "mismatched_keys": set(), "error_msgs": [],
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"9 weights are missing \(w0, w1, w2, w3, w4, …\)"):
        check_loaded_weights("Llama", report, "cannot load model 'x'")
    long = report | {"missing_keys": {f"w{i}" * 40 for i in range(9)}}
    with pytest.raises(ModelError, match=r"9 weights are missing \((w0){40}, …\)") as caught:
        check_loaded_weights("Llama", long, "cannot load model 'x'")
    assert len(str(caught.value)) <= 250


@pytest.mark.parametrize("method", [*AUTO_QUANTIZER_MAPPING, "nonsense"])
def test_a_quantised_checkpoint_loads_or_is_refused_in_one_line(folder, refusal, method):
    configure(folder, quantization_config={"quant_method": method, "bits": 4})
    try:
        Engine.from_pretrained(str(folder), device="cpu")
    except ModelError:
        beginnings = ("cannot load model ", "model ", "config.json of model ")
        assert refusal(folder).startswith(beginnings)
    else:  # unpacked where it loads, and its weights are as they were
        assert method in ("fp8", "mxfp8", "mxfp4", "gguf", "compressed-tensors")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gptq", "which is quantised by gptq: Loading a GPTQ quantized model requires"),
        ("awq", "which is quantised by awq: Loading an AWQ quantized model requires"),
        ("torchao", "whose package is not installed; run: pip install 'flexmask[quantized]'"),
        ("compressed-tensors", "not installed; run: pip install 'flexmask[quantized]'"),
    ],
)
def test_without_its_library_a_quantised_checkpoint_says_what_to_install(
    folder, refusal, monkeypatch, method, message
):
    if method in ("gptq", "awq") and find_spec("gptqmodel"):
        pytest.skip("gptqmodel is installed")
    monkeypatch.setattr("flexmask.checkpoint.config.find_spec", lambda name: None)
    configure(folder, quantization_config={"quant_method": method, "bits": 4})
    assert message in (said := refusal(folder))
    assert "install" in said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "nonesuch"}, "is of type 'nonesuch', which this version of transformers"),
        ({"model_type": "t5"}, "is of type 't5', which is not a causal language model"),
        ({"num_hidden_layers": "two"}, "Field 'num_hidden_layers' expected int, got str"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "must be a multiple of num_key_va"),
        ({"rope_parameters": {"rope_type": "nonesuch"}}, "rope_type must be one of default, lin"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "Missing required keys in `rope_parameters`"),
        ({"hidden_act": "nonesuch"}, "transformers raises KeyError: 'nonesuch'"),
        ({"quantization_config": "gptq"}, "quantization_config must be an object, got 'gptq'"),
        ({"quantization_config": {"bits": 4}}, "has no `quant_method` attribute"),
        ({"transformers_weights": "pytorch_model.bin"}, "loads safetensors only (pickled weights"),
        ({"transformers_weights": "other.safetensors"}, "has no file other.safetensors"),
        (
            {"model_type": "x", "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}},
            "comes with code of its own; to run it, pass `trust_remote_code=True`",
        ),
    ],
)
def test_a_config_that_makes_no_model_is_refused(folder, refusal, values, message):
    configure(folder, **values)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json of model"),
        ("config.json", "[]", "must be a JSON object, got a list"),
        ("config.json", POINTER, "is a Git LFS pointer, not the file itself; run git lfs pull"),
        ("generation_config.json", "{", "generation_config.json of model"),
        ("tokenizer_config.json", "[]", "must be a JSON object, got a list"),
        ("tokenizer.json", "{}", "cannot load the tokenizer of"),
        ("tokenizer.json", POINTER, "tokenizer.json of model"),
        ("model.safetensors", POINTER, "is a Git LFS pointer"),
        ("model.safetensors", "", "is damaged or not whole; download it again"),
        ("adapter_config.json", "{}", "holds an adapter, which is not a model; name the model"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(folder, refusal, name, content, message):
    (folder / name).write_text(content)
    assert message in refusal(folder)


def test_truncated_weights_are_refused(folder, refusal):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    assert "model.safetensors of model" in (message := refusal(folder))
    assert "is damaged or not whole" in message


def test_a_folder_without_a_tokenizer_is_refused(folder, refusal):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "has no tokenizer; save it there (tokenizer.save_pretrained)" in refusal(folder)


def test_an_index_of_safetensors_loads_and_one_of_pickled_weights_does_not(folder, refusal):
    split_weights(folder, "safetensors")
    assert Engine.from_pretrained(str(folder), device="cpu")
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert "lacks 1 of 1 files of weights, such as model-00001-of" in refusal(folder)


def test_an_index_that_names_pickled_weights_is_refused(folder, refusal):
    split_weights(folder, "bin")
    message = refusal(folder)
    assert "names 'model-00001-of-00001.bin'; flexmask loads safetensors only" in message


@pytest.fixture
def hub(tmp_path, monkeypatch, folder):
    """The bundled model as the hub's cache holds it, under the id ``org/model``."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    return snapshot


def test_a_hub_id_loads_from_the_cache(hub):
    assert Engine.from_pretrained("org/model", device="cpu").model.config.vocab_size == 2048


def test_a_model_of_the_hub_that_carries_an_adapter_is_refused(hub, refusal):
    (hub / "adapter_config.json").write_text("{}")
    message = "model 'org/model' holds an adapter, which is not a model; name the model that"
    assert message in refusal("org/model")


def test_pickled_weights_of_the_hub_are_refused_as_those_of_a_folder_are(hub, refusal):
    split_weights(hub, "bin")
    assert "names 'model-00001-of-00001.bin'; flexmask loads safetensors only" in refusal(
        "org/model"
    )


def test_a_hub_id_that_is_not_to_be_had_is_one_line(hub, refusal):
    assert refusal("org/other").startswith("cannot load model 'org/other': ")


@pytest.mark.parametrize(
    "value",
    ["sdpa", "kernels-community/flash-attn", {"": "kernels-community/flash-attn"}, 3],
    ids=str,
)
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_config_file_does_not_choose_the_attention(folder, key, value):
    configure(folder, **{key: value})
    model = Engine.from_pretrained(str(folder), device="cpu").model
    assert model.config._attn_implementation == "flexmask"


SMALL: dict[str, Any] = dict(
    vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_layers=2,
    num_attention_heads=4, num_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        FalconConfig(**SMALL),
        GPTNeoConfig(**SMALL, attention_types=[[["global", "local"], 1]]),
        StableLmConfig(**SMALL),
        NemotronConfig(**SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_an_architecture_with_attention_of_its_own_is_named(folder, refusal, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    message = refusal(folder, AttentionError)
    assert "ForCausalLM does not" in message
    assert "attention backends" in message or "pass keyword arguments on to attention" in message
    assert "attn_implementation" not in message


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "model must be a hub id, a folder or a .gguf file, got ''"),
        (" ", "model must be a hub id, a folder or a .gguf file, got ' '"),
        ("./nowhere", "model folder './nowhere' does not exist"),
        ("nowhere.gguf", "model file 'nowhere.gguf' does not exist"),
        ("too/many/parts", "cannot load model 'too/many/parts': Repo id must be in the form"),
        (str(model_path() / "config.json"), "is a file; name its folder, a .gguf file or a hub"),
    ],
)
def test_a_name_that_is_no_model_is_refused(refusal, model, message):
    assert message in refusal(model)
    with pytest.raises(ModelError, match=r"model|tokenizer"):
        load_tokenizer(model)


def test_long_messages_end_with_a_sentence_or_are_marked_as_cut():
    assert one_line("one\n  two.") == "one two"
    assert one_line(f"a.b: {'x' * 120}. Then {'y ' * 100}") == f"a.b: {'x' * 120}"
    assert one_line("x" * 300) == "x" * 249 + "…"


def gguf(metadata=(), tensors=(), data=b""):
    """A GGUF file of string values and of 32-bit tensors of four numbers."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    values = [("general.architecture", "llama"), *metadata]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, value in values:
        if isinstance(value, str):
            header += text(key) + struct.pack("<I", 8) + text(value)
        else:
            header += text(key) + struct.pack("<IH", 2, value)
    for number, name in enumerate(tensors):
        header += text(name) + struct.pack("<IQIQ", 1, 4, 0, 32 * number)
    return header + bytes(-len(header) % 32) + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is no GGUF file"),
        (b"PK" + bytes(100), "it is no GGUF file"),
        (POINTER.encode(), "is a Git LFS pointer"),
        (b"GGUF" + b"\xff" * 100, "its header is damaged or not whole; download it again"),
        (gguf(tensors=["a", "b"], data=bytes(40)), "it ends early, at"),
        (gguf([("split.count", 2)]), "it is one part of several; join them with llama-gguf-sp"),
        (gguf(tensors=["a"], data=bytes(16)), "cannot load the tokenizer of"),
    ],
    ids=["empty", "zip", "pointer", "junk", "truncated", "part", "bare"],
)
def test_a_gguf_file_that_is_not_whole_is_refused(tmp_path, refusal, content, message):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert message in refusal(path)
    with pytest.raises(ModelError):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    "scaled",
    [
        gguf([("llama.rope.scaling.type", "yarn")]),
        gguf(tensors=["rope_freqs.weight"], data=bytes(16)),
    ],
    ids=["yarn", "factors"],
)
def test_scaled_rotary_embeddings_of_a_gguf_file_are_refused(tmp_path, scaled):
    pytest.importorskip("gguf")
    from transformers import LlamaConfig

    from flexmask.checkpoint.gguf_file import check_rotary_embeddings, read_header

    path = tmp_path / "model.gguf"
    path.write_bytes(scaled)
    header = read_header(path, "x")
    with pytest.raises(ModelError, match="scales rotary embeddings, which transformers does not"):
        check_rotary_embeddings(header, LlamaConfig(), "x")
    read = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
    check_rotary_embeddings(header, LlamaConfig(rope_parameters=read), "x")
    path.write_bytes(gguf())
    check_rotary_embeddings(read_header(path, "x"), LlamaConfig(), "x")


def test_a_gguf_file_without_its_packages_says_what_to_install(tmp_path, refusal, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(gguf())
    monkeypatch.setattr(model_name, "find_spec", lambda name: None)
    message = refusal(tmp_path / "model.gguf")
    assert message.startswith("gguf and accelerate must be installed to read model.gguf; run: pip")


def test_a_folder_of_gguf_files_says_how_to_name_one(tmp_path, refusal):
    (tmp_path / "model.gguf").write_bytes(gguf())
    assert "has no config.json; name the file: " in refusal(tmp_path)


def test_results_of_a_gguf_file_go_to_a_folder_of_its_name():
    assert default_folder("in", "models/SmolLM2.Q4_1.gguf") == Path("outputs/in/SmolLM2.Q4_1")
    assert default_folder("in", "org/Model-1.5") == Path("outputs/in/Model-1.5")


@pytest.mark.usefixtures("without_inductor")
def test_a_loaded_model_generates(folder):
    engine = Engine.from_pretrained(str(folder), device="cpu")
    (one,) = engine.generate([Request(("Q: Where?",), suffix="\nA:")], "causal", max_new_tokens=2)
    assert one.token_ids
