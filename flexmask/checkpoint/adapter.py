"""Merges a LoRA adapter into a model, by peft."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from flexmask.checkpoint.folder import weight_shapes
from flexmask.checkpoint.model_name import ADAPTER_CONFIG, ADAPTER_WEIGHTS, shown
from flexmask.checkpoint.source import CheckpointSource
from flexmask.checkpoint.transformers_calls import errors_in_one_line
from flexmask.checkpoint.weights import check_loaded_weights
from flexmask.errors import ModelError

_NAME = "flexmask_adapter"
"""Name of the adapter while peft holds it: a part of the names of its tensors alone."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def merge_adapter(model: PreTrainedModel, adapter: str, base: str) -> None:
    """Add the weights of a LoRA adapter to those of a model, in place.

    The products of LoRA's factors are computed in float32 and rounded once, to the dtype of the
    model.

    Args:
        model: The model, on its device.
        adapter: Folder of the adapter.
        base: Name of the model: hub id, folder or GGUF file.

    Raises:
        ModelError: If the adapter is of another kind, damaged, or made for another model.
    """
    source = CheckpointSource(adapter, adapter, folder=Path(adapter))
    values = source.read_json(ADAPTER_CONFIG, must_exist=True) or {}
    _check_kind(values, adapter)
    _check_base(values.get("base_model_name_or_path"), adapter, base)
    weights = Path(adapter, ADAPTER_WEIGHTS)
    shapes = weight_shapes(weights, adapter)
    what = f"cannot load adapter {shown(adapter)}"
    with errors_in_one_line(what, "peft"):
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict

        config = PeftConfig.from_pretrained(adapter)
        config.inference_mode = True
        wrapped: Any = PeftModel(model, config, adapter_name=_NAME)
        report: dict[str, Any] = {
            "mismatched_keys": [
                (name, shapes[name], list(tensor.shape))
                for key, tensor in wrapped.state_dict().items()
                if (name := key.replace(f".{_NAME}", "")) != key
                and shapes.get(name, list(tensor.shape)) != list(tensor.shape)
            ],
            "missing_keys": [],
            "unexpected_keys": [],
        }
        _check(report, what)
        loaded = set_peft_model_state_dict(wrapped, load_file(weights), adapter_name=_NAME)
        # Of parameters that are tied, the file holds the first, and so does named_parameters.
        own = {name for name, _ in wrapped.named_parameters() if _NAME in name.split(".")}
        report["missing_keys"] = own.intersection(loaded.missing_keys)
        report["unexpected_keys"] = loaded.unexpected_keys
        _check(report, what)
        _untie_adapted(model)
        wrapped.merge_and_unload(safe_merge=True)
    model.requires_grad_(False)  # which peft sets for modules that it replaced


def _check_kind(values: dict[str, Any], adapter: str) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ModelError(
            f"adapter {shown(adapter)} is of type {str(kind)[:40]!r}; flexmask merges LORA only"
        )


def _check_base(made_for: object, adapter: str, base: str) -> None:
    """Refuse an adapter whose configuration names another model of the hub.

    A folder's name does not say which model is in it, so there only names and shapes of weights
    tell whether an adapter fits.
    """
    if not isinstance(made_for, str) or Path(base).exists() or Path(made_for).exists():
        return
    if _HUB_ID.fullmatch(made_for) and made_for != base:
        raise ModelError(
            f"adapter {shown(adapter)} was made for model {shown(made_for)}, not {shown(base)}; "
            f"if both have the same weights, change base_model_name_or_path in {ADAPTER_CONFIG}"
        )


def _check(report: dict[str, Any], what: str) -> None:
    check_loaded_weights("this model", report, what, "; it was made for another model")


def _untie_adapted(model: PreTrainedModel) -> None:
    """Give the output layer a weight of its own if it or the embedding it shares is adapted.

    peft adapts one of the two; merged into the shared weight, the adapter would change both.
    """
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    layers = [end.get_base_layer() if hasattr(end, "get_base_layer") else end for end in ends]
    if None in layers or layers == ends or layers[0].weight is not layers[1].weight:
        return
    layers[1].weight = nn.Parameter(layers[1].weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
