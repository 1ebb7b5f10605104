"""Small models of transformers' decoder families, as docs/model_families.py makes them."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from flexmask.attention.backend import register_attention
from oracles import SHAPE

SOURCE = Path(__file__).parents[1] / "docs" / "model_families.py"
_spec = importlib.util.spec_from_file_location("model_families", SOURCE)
assert _spec is not None
assert _spec.loader is not None
families = sys.modules["model_families"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)


def known(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")


def small_model(family, implementation="flexmask", **changes):
    known(family)
    register_attention()
    config = families.small_config(family, SHAPE["vocab_size"])
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.eval().requires_grad_(False)
