"""The machine of a measurement: hardware, versions, and measured peak rates."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from flexmask.device_clock import time_call

READ_BYTES = {"cuda": 8 * 10**9, "cpu": 2**30}
MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}


def machine_stamp() -> dict[str, str | int | None]:
    """Return hardware and versions, for the record of a measurement; None for absent ones."""
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


def read_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second at which a sum reads a tensor larger than the caches."""
    values = torch.ones(READ_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    return 1e3 * values.nbytes / time_call(values.sum, device, repeats=10).median


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a large square matrix product."""
    side = MATRIX_SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    result = torch.empty_like(matrix)
    spread = time_call(lambda: torch.mm(matrix, matrix, out=result), device, repeats=10)
    return 1e3 * 2 * side**3 / spread.median
