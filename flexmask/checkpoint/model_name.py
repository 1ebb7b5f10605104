"""Names of models and adapters, checked without importing a library."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from flexmask.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_LONGEST_SHOWN = 100


def check_model_name(name: str) -> None:
    """Check that a name is an existing folder or file, or may be a hub id.

    Raises:
        ModelError: If it is neither, or needs a package that is not installed.
    """
    if not name.strip():
        raise ModelError(f"model must be a hub id, a folder or a .gguf file, got {name!r}")
    path = Path(name)
    # Unlike pathlib, os.path treats names that are impossible or not accessible as absent.
    if os.path.isdir(path):
        return
    if path.suffix == ".gguf":
        _check_gguf(name, path)
    elif os.path.exists(path):
        raise ModelError(
            f"model {shown(name)} is a file; name its folder, a .gguf file or a hub id"
        )
    elif name.startswith((".", "/", "~")):
        raise ModelError(f"model folder {shown(name)} does not exist")


def check_adapter_name(name: str) -> None:
    """Check that a name is a folder with an adapter in safetensors, and that peft can load it.

    Raises:
        ModelError: If it is not, or peft is not installed.
    """
    folder = Path(name)
    if not os.path.isdir(folder):
        raise ModelError(f"adapter folder {shown(name)} does not exist")
    if not os.path.isfile(folder / ADAPTER_CONFIG):
        raise ModelError(f"adapter folder {shown(name)} has no {ADAPTER_CONFIG}")
    if not os.path.isfile(folder / ADAPTER_WEIGHTS):
        raise ModelError(
            f"adapter folder {shown(name)} has no {ADAPTER_WEIGHTS}; flexmask loads safetensors "
            "only (pickled weights can run code)"
        )
    if find_spec("peft") is None:
        raise ModelError(
            "peft must be installed to load an adapter; run: pip install 'flexmask[adapters]'"
        )


def shown(name: str) -> str:
    """Return a model's name in quotes; only the end of a long path."""
    return repr(name if len(name) <= _LONGEST_SHOWN else "…" + name[1 - _LONGEST_SHOWN :])


def _check_gguf(name: str, path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"model file {shown(name)} does not exist")
    absent = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if absent:
        raise ModelError(
            f"{' and '.join(absent)} must be installed to read {path.name}; "
            "run: pip install 'flexmask[gguf]'"
        )
