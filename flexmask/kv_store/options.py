"""Options of a store of keys and values: its tiers and their bounds in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexmask.errors import OptionError

DEFAULT_FOLDER_BYTES = 64 * 2**30


@dataclass(frozen=True)
class KVCacheOptions:
    """The tiers that keep keys and values of spans between prompts, runs and processes.

    Attributes:
        gpu_bytes: Bound of the memory on the GPU that the model is on; 0 for no such tier.
        host_bytes: Bound of the host memory; 0 for no such tier. On a CPU it is the only memory.
        folder: A folder that many processes share; None for no such tier.
        folder_bytes: Bound of the folder's files.

    Raises:
        OptionError: If a bound is negative, or nothing is kept anywhere.
    """

    gpu_bytes: int = 0
    host_bytes: int = 0
    folder: Path | None = None
    folder_bytes: int = DEFAULT_FOLDER_BYTES

    def __post_init__(self) -> None:
        for name in ("gpu_bytes", "host_bytes", "folder_bytes"):
            if (value := getattr(self, name)) < 0:
                raise OptionError(f"{name} must be at least 0, got {value}")
        if not (self.gpu_bytes or self.host_bytes or self.folder):
            raise OptionError("a cache of keys and values needs gpu_bytes, host_bytes or a folder")
