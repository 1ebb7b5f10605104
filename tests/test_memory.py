"""Memory that is free, as Linux tells it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexmask.engine import memory
from flexmask.engine.memory import free_bytes, is_out_of_memory

CPU = torch.device("cpu")
MIB = 2**20
MEMINFO = {"/proc/meminfo": "MemTotal:  8192 kB\nMemAvailable:  4096 kB\nCached:  9999 kB\n"}
VERSION_2 = "/sys/fs/cgroup"
VERSION_1 = "/sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (MEMINFO, 4 * MIB),
        (
            MEMINFO
            | {
                "/proc/self/cgroup": "0::/batch/job 7\n",
                f"{VERSION_2}/batch/memory.max": f"{3 * MIB}\n",
                f"{VERSION_2}/batch/memory.current": f"{2 * MIB}\n",
                f"{VERSION_2}/batch/memory.stat": f"file 1\ninactive_file {MIB // 2}\n",
                f"{VERSION_2}/batch/job 7/memory.max": "max\n",
                f"{VERSION_2}/batch/job 7/memory.current": f"{MIB}\n",
            },
            MIB + MIB // 2,
        ),
        (
            MEMINFO
            | {
                "/proc/self/cgroup": "9:cpu:/x\n4:memory:/seen/from/outside\n",
                f"{VERSION_1}/memory.limit_in_bytes": f"{2 * MIB}\n",
                f"{VERSION_1}/memory.usage_in_bytes": f"{3 * MIB}\n",
            },
            0,
        ),
        (MEMINFO | {"/proc/self/cgroup": "0::/../../escaped\n"}, 4 * MIB),
    ],
    ids=["no control group", "version 2", "version 1, in a container", "odd path"],
)
def test_what_is_free_is_what_the_strictest_limit_leaves(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: int
) -> None:
    monkeypatch.setattr(memory, "_read", lambda path: files.get(str(path), ""))
    assert free_bytes(CPU) == free


def test_without_linux_all_memory_counts_and_without_posix_none_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "_read", lambda path: "")
    assert (free_bytes(CPU) or 0) >= 2**28
    monkeypatch.delattr("os.sysconf")
    assert free_bytes(CPU) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_here_some_memory_is_free() -> None:
    assert 2**24 < (free_bytes(CPU) or 0) < 2**50


def test_the_failure_of_an_allocator_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("no room"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
