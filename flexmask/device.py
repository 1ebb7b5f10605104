"""Devices, dtypes and 8-bit weights by name, and starting a GPU before it is needed.

Names can be checked without torch, so that errors appear before torch is imported.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from flexmask.error_text import did_you_mean
from flexmask.errors import OptionError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
"""Names of dtypes, as in torch."""

DTYPES_OF_8_BITS = {"int8": "int8", "fp8": "float8_e4m3fn"}
"""Names of what weights are rounded to, and of their dtypes in torch."""

_FLOAT8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that convert float8."""

_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,9})?")


def check_device_name(name: str) -> None:
    """Check that a name is one of a device, which need not exist (see `resolve_device`).

    Raises:
        OptionError: If it is not.
    """
    if not _DEVICE.fullmatch(name):
        raise OptionError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")


def check_dtype_name(name: str) -> None:
    """Check that a name is ``auto`` or one of `DTYPES`.

    Raises:
        OptionError: If it is not.
    """
    if name != "auto" and name not in DTYPES:
        close = did_you_mean(name, DTYPES)
        raise OptionError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}{close}")


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device.

    Raises:
        OptionError: If the name is not a device, or there is no such GPU.
    """
    check_device_name(name)
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError("device cuda asked for, but torch sees no CUDA GPU; use `device=cpu`")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {name} asked for, but torch sees {torch.cuda.device_count()}")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Turn a name into a dtype; ``auto`` is float32 on a CPU and the model's own on a GPU.

    Raises:
        OptionError: If the name is not known.
    """
    check_dtype_name(name)
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def check_quantize_name(name: str) -> None:
    """Check that a name is one of `DTYPES_OF_8_BITS`.

    Raises:
        OptionError: If it is not.
    """
    if name not in DTYPES_OF_8_BITS:
        close = did_you_mean(name, list(DTYPES_OF_8_BITS))
        raise OptionError(f"quantize must be int8 or fp8, got {name!r}{close}")


def resolve_quantize(name: str, device: torch.device) -> torch.dtype:
    """Turn ``int8`` or ``fp8`` into a dtype.

    Raises:
        OptionError: If the name is not known, or the device does not convert the dtype.
    """
    check_quantize_name(name)
    import torch

    if name == "fp8" and device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < _FLOAT8_CAPABILITY:
            raise OptionError(
                "quantize fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper), "
                f"got {found[0]}.{found[1]}; use `quantize=int8`"
            )
    dtype = getattr(torch, DTYPES_OF_8_BITS[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def start_device(device: torch.device) -> None:
    """Initialise CUDA and its matrix products, which takes half a second outside Python."""
    if device.type == "cuda":
        import torch

        one = torch.ones(1, 1, device=device)
        torch.mm(one, one)
        torch.cuda.synchronize(device)
