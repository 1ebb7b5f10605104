"""Makes the names of files survive a crash of the machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def sync_folder(path: Path) -> None:
    """Make a rename to ``path`` survive a crash of the machine."""
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems do not sync folders
            os.fsync(fd)
    finally:
        os.close(fd)
