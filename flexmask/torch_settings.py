"""torch's global settings, which code of others may change behind everybody's back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Setting:
    """How a setting is read and written, and what it is when torch was just imported."""

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]
    fresh: Any


def _attribute(module: str, name: str) -> _Setting:
    def home(torch: Any) -> Any:
        return getattr(torch.backends, module)

    return _Setting(
        lambda torch: getattr(home(torch), name),
        lambda torch, value: setattr(home(torch), name, value),
        fresh=False,
    )


_SETTINGS = {
    "default dtype": _Setting(
        lambda torch: str(torch.get_default_dtype()),
        lambda torch, value: torch.set_default_dtype(getattr(torch, value.split(".")[1])),
        fresh="torch.float32",
    ),
    "default device": _Setting(
        lambda torch: str(torch.get_default_device()),
        lambda torch, value: torch.set_default_device(None if value == "cpu" else value),
        fresh="cpu",
    ),
    "float32 matmul precision": _Setting(
        lambda torch: torch.get_float32_matmul_precision(),
        lambda torch, value: torch.set_float32_matmul_precision(value),
        fresh="highest",
    ),
    "deterministic debug mode": _Setting(  # what use_deterministic_algorithms sets
        lambda torch: torch.get_deterministic_debug_mode(),
        lambda torch, value: torch.set_deterministic_debug_mode(value),
        fresh=0,
    ),
    "grad mode": _Setting(
        lambda torch: torch.is_grad_enabled(),
        lambda torch, value: torch.set_grad_enabled(value),
        fresh=True,
    ),
    "cudnn benchmark": _attribute("cudnn", "benchmark"),
    "cudnn deterministic": _attribute("cudnn", "deterministic"),
    # Unknown when fresh: it follows the machine and its environment.
    "number of threads": _Setting(
        lambda torch: torch.get_num_threads(),
        lambda torch, value: torch.set_num_threads(value),
        fresh=None,
    ),
}


def read_settings() -> Mapping[str, Any]:
    """The settings by name; those of a fresh torch while it is not imported."""
    torch = _imported_torch()
    if torch is None:
        return {name: item.fresh for name, item in _SETTINGS.items()}
    return {name: item.read(torch) for name, item in _SETTINGS.items()}


def restore_settings(before: Mapping[str, Any]) -> tuple[str, ...]:
    """Put back what changed since ``before`` was read; say what it was, setting by setting."""
    torch = _imported_torch()
    if torch is None:
        return ()
    changed = []
    for name, item in _SETTINGS.items():
        value = item.read(torch)
        if before[name] is not None and value != before[name]:
            item.write(torch, before[name])
            changed.append(f"torch's {name} to {value}")
    return tuple(changed)


def _imported_torch() -> Any:
    """The module torch where it is imported whole; this imports nothing."""
    torch = sys.modules.get("torch")
    spec = getattr(torch, "__spec__", None)
    return None if getattr(spec, "_initializing", False) else torch
