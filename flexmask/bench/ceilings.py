"""What a device can do at most, measured: bytes read and matrix products per second."""

from __future__ import annotations

import torch

from flexmask.bench.clock import time_call

READ_BYTES = {"cuda": 8 * 10**9, "cpu": 2**30}
MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which a sum reads a tensor that no cache holds."""
    values = torch.ones(READ_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    return 1e3 * values.nbytes / time_call(values.sum, device, repeats=10).median


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product."""
    side = MATRIX_SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    result = torch.empty_like(matrix)
    spread = time_call(lambda: torch.mm(matrix, matrix, out=result), device, repeats=10)
    return 1e3 * 2 * side**3 / spread.median
