"""Loads values into some rows of a device's buffers, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, device, tensor


def to_device(values: Tensor, target: device) -> Tensor:
    """Copy a tensor from the host; on CUDA the copy is queued, from pinned memory."""
    if target.type == "cuda":
        return values.pin_memory().to(target, non_blocking=True)
    return values.to(target)


def load_rows(buffer: Tensor, rows: Sequence[int], values: Tensor) -> None:
    """Load values into rows of a buffer, which stays in place.

    On CUDA this is queued behind the steps that are queued already.

    Args:
        buffer: ``(B, …)``.
        rows: ``N`` rows of it.
        values: ``(N, …)``, on the host.
    """
    buffer.index_copy_(0, to_device(tensor(rows), buffer.device), to_device(values, buffer.device))
