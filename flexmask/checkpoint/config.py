"""Loads a model's configuration, and refuses values with which no model can run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.auto import AutoHfQuantizer

from flexmask.checkpoint.gguf_file import check_rotary_embeddings, read_header
from flexmask.checkpoint.model_name import shown
from flexmask.checkpoint.source import CheckpointSource
from flexmask.errors import AttentionError, ModelError

AUTO_MODEL = "AutoModelForCausalLM"

_PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "torchao": "torchao",
}
"""Packages of the extra ``quantized``, by method; transformers names those of other methods."""


def check_config_file(source: CheckpointSource, *, trust_remote_code: bool = False) -> None:
    """Check that transformers has the model class that ``config.json`` names.

    Raises:
        ModelError: If it has not, or if the class is code that comes with the model and is not
            trusted.
        OSError: If the file is on the hub, and the hub cannot be reached.
    """
    if source.gguf is not None:
        return
    values = source.read_json("config.json", must_exist=True) or {}
    for key in ("quantization_config", "text_config"):
        if not isinstance(values.get(key, {}), dict | None):
            raise ModelError(
                f"config.json of model {shown(source.name)}: {key} must be an object, "
                f"got {str(values[key])[:40]!r}"
            )
    auto_map = values.get("auto_map")
    is_remote = isinstance(auto_map, dict) and {"AutoConfig", AUTO_MODEL} & set(auto_map)
    kind = values.get("model_type")
    if kind in CONFIG_MAPPING or (is_remote and trust_remote_code):
        return
    if is_remote:
        raise ModelError(
            f"model {shown(source.name)} comes with code of its own; to run it, pass "
            "`trust_remote_code=True`"
        )
    if kind is not None:
        raise ModelError(
            f"model {shown(source.name)} is of type {str(kind)[:40]!r}, which this version of "
            "transformers does not know; upgrade transformers, or check config.json"
        )


def load_config(
    source: CheckpointSource, *, trust_remote_code: bool = False, needs_backend: bool = True
) -> PreTrainedConfig:
    """Load the configuration of a causal language model.

    Raises:
        ModelError: If there is no configuration, or no model can be made from it.
        AttentionError: If its architecture needs to support attention backends, and does not.
    """
    header = read_header(source.gguf, source.name) if source.gguf else None
    config = AutoConfig.from_pretrained(
        source.location, trust_remote_code=trust_remote_code, **source.options
    )
    assert isinstance(config, PreTrainedConfig)
    _check_quantization(config, source.name)
    text = config.get_text_config(decoder=True)
    _check_heads(text, source.name)
    _check_rope(text, source.name)
    if header is not None:
        check_rotary_embeddings(header, text, source.name)
    if not (trust_remote_code and AUTO_MODEL in (getattr(config, "auto_map", None) or {})):
        _check_architecture(config, source.name, needs_backend)
    return config


def quantization_of(config: PreTrainedConfig) -> str | None:
    """Return the quantisation method of a checkpoint; None if it is not quantised."""
    values = _quantization_values(config)
    if not values:
        return None
    method = values.get("quant_method")
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        method = "bitsandbytes"  # for transformers, whatever the method says
    return str(getattr(method, "value", method))


def _check_quantization(config: PreTrainedConfig, name: str) -> None:
    values = _quantization_values(config)
    # Without this check transformers ignores the quantisation, with a line in its log.
    if values and not AutoHfQuantizer.supports_quant_method(values):
        raise ModelError(
            f"model {shown(name)} is quantised by {str(values.get('quant_method'))[:40]!r}, which "
            "this version of transformers does not know; load one that is not quantised"
        )
    method = quantization_of(config)
    if method == "compressed-tensors":
        _check_compressed_tensors(values, name)
    elif method is not None and method.startswith("bitsandbytes"):
        _check_bitsandbytes(values, name)
    package = _PACKAGES.get(method or "")
    if package is not None and find_spec(package) is None:
        raise ModelError(
            f"model {shown(name)} is quantised by {method}, whose package is not installed; run: "
            "pip install 'flexmask[quantized]'"
        )


def _check_compressed_tensors(values: dict[str, Any], name: str) -> None:
    groups = values.get("config_groups")
    schemes = groups.values() if isinstance(groups, dict) else ()
    if any(isinstance(one, dict) and one.get("input_activations") for one in schemes):
        raise ModelError(
            f"model {shown(name)} is quantised by compressed-tensors, inputs of layers included "
            "(input_activations), which torch.compile does not trace; load one whose weights "
            "alone are quantised"
        )


def _check_bitsandbytes(values: dict[str, Any], name: str) -> None:
    if not (values.get("load_in_4bit") or values.get("load_in_8bit")):
        raise ModelError(
            f"config.json of model {shown(name)}: quantization_config of bitsandbytes must load "
            "in 4 or 8 bits"
        )
    if values.get("load_in_8bit"):
        raise ModelError(
            f"model {shown(name)} is quantised to 8 bits by bitsandbytes, which picks outliers "
            "over all tokens of a batch, so that no mask isolates them; load one of 4 bits"
        )


def _quantization_values(config: PreTrainedConfig) -> dict[str, Any]:
    values = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    return dict(values) if isinstance(values, dict) else values.to_dict() if values else {}


def _check_heads(config: PreTrainedConfig, name: str) -> None:
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None)
    if not isinstance(heads, int):
        return
    if heads < 1:
        raise ModelError(
            f"config.json of model {shown(name)}: num_attention_heads must be positive, "
            f"got {heads}"
        )
    if isinstance(kv_heads, int) and (kv_heads < 1 or heads % kv_heads):
        raise ModelError(
            f"config.json of model {shown(name)}: num_attention_heads must be a multiple of "
            f"num_key_value_heads, got {heads} and {kv_heads}"
        )


def _check_rope(config: PreTrainedConfig, name: str) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in by_layer or [rope]:
        kind = parameters.get("rope_type", "default")
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            raise ModelError(
                f"config.json of model {shown(name)}: rope_type must be one of default, "
                f"{', '.join(ROPE_INIT_FUNCTIONS)}, got {str(kind)[:40]!r}"
            )


def _check_architecture(config: PreTrainedConfig, name: str, needs_backend: bool) -> None:
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise ModelError(
            f"model {shown(name)} is of type {config.model_type!r}, which is not a causal "
            "language model; flexmask runs no others"
        )
    # From a tuple, transformers chooses by the architecture that config.json names.
    if needs_backend and not isinstance(model_class, tuple):
        check_backend(model_class)


def check_backend(model_class: Any) -> None:
    """Check that models of a class support attention backends.

    Raises:
        AttentionError: If they do not.
    """
    if not model_class.is_backend_compatible():
        raise AttentionError(
            f"{model_class.__name__} does not support transformers' attention backends, which the "
            "engine needs; choose a model of another architecture, or use_strategy with the dense "
            "reference if `flexmask doctor --model` finds that right"
        )
