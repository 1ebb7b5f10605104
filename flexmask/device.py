"""Devices and number types by name, and starting a GPU before it is needed."""

from __future__ import annotations

import torch

from flexmask.errors import OptionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device.

    Raises:
        OptionError: If the name is no device, or CUDA is asked for and absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OptionError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError("device cuda asked for, but torch sees no CUDA GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {name} asked for, but torch sees {torch.cuda.device_count()}")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Turn a name into a dtype; ``auto`` is float32 on CPU and the model's own on a GPU.

    Raises:
        OptionError: If the name is not known.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise OptionError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def start_device(device: torch.device) -> None:
    """Have CUDA and its matrix products ready: half a second, in which nothing is imported."""
    if device.type == "cuda":
        one = torch.ones(1, 1, device=device)
        torch.mm(one, one)
        torch.cuda.synchronize(device)
