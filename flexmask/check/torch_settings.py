"""torch's global settings, which a strategy must not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.backends import cudnn

_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (
        torch.get_default_device,
        # Setting a device enters a mode that slows every operation; None leaves that mode.
        lambda value: torch.set_default_device(None if value.type == "cpu" else value),
    ),
    "float32 matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "deterministic debug mode": (  # what use_deterministic_algorithms sets
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "cudnn benchmark": (
        lambda: cudnn.benchmark,
        lambda value: setattr(cudnn, "benchmark", value),
    ),
    "cudnn deterministic": (
        lambda: cudnn.deterministic,
        lambda value: setattr(cudnn, "deterministic", value),
    ),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
}
"""The functions that read and write each setting."""


def read_settings() -> Mapping[str, Any]:
    """Return the value of each setting."""
    return {name: read() for name, (read, _) in _SETTINGS.items()}


def restore_settings(before: Mapping[str, Any]) -> tuple[str, ...]:
    """Restore the settings that changed since ``before`` was read.

    Returns:
        A phrase for each changed setting with the value found, such as ``torch's default dtype to
        torch.float64``.
    """
    changed = []
    for name, (read, write) in _SETTINGS.items():
        value = read()
        if value != before[name]:
            write(before[name])
            changed.append(f"torch's {name} to {value}")
    return tuple(changed)
