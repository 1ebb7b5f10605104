"""Checkpoints with quantised weights: the engine computes what transformers does with them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    TorchAoConfig,
)

from flexmask.doctor.model_checks import check_model
from flexmask.engine import Engine
from flexmask.engine.compiled_view import multiply_few_rows
from flexmask.engine.fused_projections import fuse_projections
from flexmask.engine.model_loading import load_model
from flexmask.engine.shared_tensors import tensors_by_id
from flexmask.errors import ModelError
from flexmask.kernels.linear_weights import DENSE, is_plain_linear, kinds_of_projections
from flexmask.plugins.registry import make_strategy
from flexmask_cli.render.generation import print_notes
from oracles import make_model
from quantised_models import NUM_PROJECTIONS, TOKENS, fused_launches, save_plain, with_parts

QUANTIZED = "needs flexmask[quantized]"
torchao: Any = pytest.importorskip("torchao.quantization", reason=QUANTIZED)
bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason=QUANTIZED)
pytest.importorskip("compressed_tensors", reason=QUANTIZED)

CPU = torch.device("cpu")
INT4: torch.dtype = vars(torch)["int4"]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain"))


def quantised(plain: Path, folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    """Quantise by transformers, and save."""
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=dtype)
    model.save_pretrained(folder)
    for file in plain.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    weights = {"symmetric": True, "strategy": "channel", "dynamic": False} | weights
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


def float8_rows(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def packed_int4(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.view(len(weight), -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    digits = ((groups / scale).round() + 8).to(torch.int32).view(weight.shape)
    packed = sum((digits[:, i::8] << 4 * i for i in range(8)), torch.tensor(0, dtype=torch.int32))
    shape = torch.tensor(weight.shape)
    return {"weight_packed": packed, "weight_scale": scale[..., 0], "weight_shape": shape}


def float8_blocks(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    blocks = weight.view(rows // 32, 32, columns // 32, 32)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    digits = (blocks / scale).to(torch.float8_e4m3fn).view(rows, columns)
    return {"weight": digits, "weight_scale_inv": scale[:, 0, :, 0]}


MAKERS: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "torchao int8": (
        "Int8Tensor of torchao",
        lambda plain, to: quantised(
            plain, to, TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
        ),
    ),
    "torchao float8": (
        "Float8Tensor of torchao",
        lambda plain, to: quantised(plain, to, TorchAoConfig(torchao.Float8WeightOnlyConfig())),
    ),
    "torchao int4": (
        "IntxUnpackedToInt8Tensor of torchao",
        lambda plain, to: quantised(
            plain, to, TorchAoConfig(torchao.IntxWeightOnlyConfig(INT4, torchao.PerGroup(32)))
        ),
    ),
    "bitsandbytes nf4": (
        "Linear4bit of bitsandbytes",
        lambda plain, to: quantised(
            plain, to, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        ),
    ),
    "compressed-tensors float8": (
        DENSE,
        lambda plain, to: with_parts(
            plain, to, compressed("float-quantized", num_bits=8, type="float"), float8_rows
        ),
    ),
    "compressed-tensors int4": (
        DENSE,
        lambda plain, to: with_parts(
            plain,
            to,
            compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
            packed_int4,
        ),
    ),
    "fp8": (
        DENSE,
        lambda plain, to: with_parts(
            plain, to, {"quant_method": "fp8", "weight_block_size": [32, 32]}, float8_blocks
        ),
    ),
}


@pytest.mark.parametrize("method", MAKERS)
def test_a_quantised_checkpoint_computes_what_transformers_computes(
    plain, tmp_path, without_inductor, method, capsys
) -> None:
    kind, make = MAKERS[method]
    folder = make(plain, tmp_path / "model")
    model, tokenizer = load_model(str(folder), device=CPU, dtype="float32")
    checks = check_model(model, tokenizer)
    assert [check.state for check in checks] == ["ok", "ok"], checks
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
        of_plain = AutoModelForCausalLM.from_pretrained(plain)(TOKENS).logits
        model.set_attn_implementation("sdpa")
        found = model(TOKENS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - of_plain).abs().max() > 0.01
    is_readable = kind in (DENSE, "Int8Tensor of torchao", "Float8Tensor of torchao")
    assert kinds_of_projections(model)[kind, is_readable] >= NUM_PROJECTIONS
    model.set_attn_implementation("flexmask")
    capsys.readouterr()
    engine = Engine(model, tokenizer)
    print_notes(engine, make_strategy("causal", {}), "attention")
    said = "15 with dense weights" if kind == DENSE else "14 not fused, since their weights are"
    assert f"projections: {said}" in capsys.readouterr().err.replace("1 with dense weights, ", "")


def test_a_layer_that_torchao_quantised_keeps_its_own_product(plain) -> None:
    def dense(**options: Any) -> nn.Linear:
        return nn.Linear(64, 48, **options).requires_grad_(False)

    packed, replaced = dense(bias=False), dense()
    torchao.quantize_(packed, torchao.Int8WeightOnlyConfig(version=2))
    vars(replaced)["forward"] = nn.Identity()
    float8 = dense()
    float8.weight = nn.Parameter(float8.weight.to(torch.float8_e4m3fn), requires_grad=False)
    layers = [dense(), packed, replaced, float8, bitsandbytes.nn.Linear4bit(64, 48)]
    assert [is_plain_linear(layer) for layer in layers] == [True, False, False, False, False]
    view: Any = nn.ModuleList(layers)
    multiply_few_rows(view)
    assert ["forward" in vars(layer) for layer in layers] == [True, False, True, False, False]


@pytest.mark.parametrize(
    "config", [torchao.Int8WeightOnlyConfig(version=2), torchao.Float8WeightOnlyConfig()]
)
def test_projections_of_8_bits_with_a_scale_for_each_row_are_fused_as_dense_ones(config) -> None:
    torch.manual_seed(0)
    model = make_model("llama", "eager")
    layer = model.model.layers[0]
    torchao.quantize_(layer.mlp, config)
    torchao.quantize_(layer.self_attn, config, lambda module, name: name == "k_proj")
    assert fused_launches(layer) == 5  # queries and values; keys; output; gate and up; down


def test_layers_that_round_their_inputs_keep_their_own_product() -> None:
    layer = nn.Linear(64, 48).requires_grad_(False)
    torchao.quantize_(layer, torchao.Int8DynamicActivationInt8WeightConfig(version=2))
    launches = []

    def fuse(module: Any, _: Any) -> Any:
        launches.append(fuse_projections(module.graph))
        return module.forward

    torch._dynamo.reset()
    torch.compile(layer, backend=fuse, fullgraph=True)(torch.randn(2, 64))
    assert launches == [0]


def test_views_of_a_model_share_what_bitsandbytes_keeps_beside_its_weights(plain, tmp_path):
    folder = MAKERS["bitsandbytes nf4"][1](plain, tmp_path / "model")
    model, _ = load_model(str(folder), device=CPU, dtype="auto")
    view = copy.deepcopy(model, tensors_by_id(model))
    layer, copied = (m.get_submodule("model.layers.0.mlp.up_proj") for m in (model, view))
    assert copied is not layer
    assert copied.weight is layer.weight
    assert copied.quant_state is layer.quant_state


def test_without_a_dtype_quantised_weights_compute_in_their_own(plain, tmp_path) -> None:
    folder = quantised(
        plain,
        tmp_path / "model",
        TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2)),
        torch.bfloat16,
    )
    model, _ = load_model(str(folder), device=CPU, dtype="auto")
    assert model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="compute in bfloat16 only; pass `dtype=bfloat16`"):
        load_model(str(folder), device=CPU, dtype="float32")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "picks outliers over all tokens of a batch, so that no mask isolates them",
        ),
        ({"quant_method": "bitsandbytes_4bit"}, "must load in 4 or 8 bits"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"input_activations": {"num_bits": 8}}},
            },
            "inputs of layers included (input_activations), which torch.compile does not trace",
        ),
    ],
)
def test_what_cannot_run_right_is_refused(plain, tmp_path, config, message) -> None:
    folder = with_parts(plain, tmp_path / "model", config, lambda weight: {"weight": weight})
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), device=CPU, dtype="auto")
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 250
