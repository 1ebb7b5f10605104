"""Free memory of a device, and the errors by which torch reports that there is too little."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

_CGROUP_FILES = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Mount point and files of control groups, version 2 and 1: limit, use, reclaimable cache."""


def free_bytes(device: torch.device) -> int | None:
    """Estimate the memory that can be allocated, in bytes.

    On a GPU: memory that no process holds, and memory that torch's allocator has cached. On a CPU:
    ``MemAvailable`` of Linux, within the limits of the process's control groups (those of a
    container or a batch system); on other systems all physical memory.

    Returns:
        None if the operating system reports none of these.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    values = [*_available(), *_left_in_cgroups()]
    return max(0, min(values)) if values else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error reports that there is too little memory.

    torch has an exception type for GPUs only; its CPU allocator raises a plain `RuntimeError`
    (torch 2.13).
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _available() -> Iterator[int]:
    text = _read(Path("/proc/meminfo"))
    if found := re.search(r"^MemAvailable: *(\d+) kB$", text, re.MULTILINE):
        yield int(found[1]) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_cgroups() -> Iterator[int]:
    """Yield the bytes left in each control group of this process and in their parents."""
    own = [
        line.split(":", 2)[2].lstrip("/") for line in _read(Path("/proc/self/cgroup")).splitlines()
    ]
    for mount, limit_file, use_file, kept in _CGROUP_FILES:
        groups = {group for path in own for group in (mount / path, *(mount / path).parents)}
        for group in groups:
            if not group.is_relative_to(mount):
                continue
            limit, use = _read(group / limit_file).strip(), _read(group / use_file).strip()
            if limit.isdecimal() and use.isdecimal():
                stat = re.search(rf"^{kept} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
                yield int(limit) - int(use) + (int(stat[1]) if stat else 0)


def _read(path: Path) -> str:
    """Read a file of the kernel; empty if there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
