"""With what something was measured."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def machine_stamp() -> dict[str, str | int | None]:
    """Machine and versions, for the record of a measurement."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "triton", "flexmask")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
