"""Starts the processes of ranks; needs no torch, so they import it while this process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection

PROGRAM = "flexmask.engine.rank_process"

_waiting: list[RankHandle] = []
"""Processes that `start_processes` has started and no engine has taken yet."""


@dataclass(frozen=True)
class RankHandle:
    """A process that becomes a rank once it is told which.

    It ends when the connection does, and so with this process.

    Attributes:
        process: The process.
        connection: The connection to it.
    """

    process: subprocess.Popen[bytes]
    connection: Connection

    def ending(self) -> str:
        """Say how the process ended, whose connection is closed."""
        try:
            status = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def end(self, limit_s: float) -> None:
        """Wait for the process to end, and kill it after some seconds."""
        try:
            self.process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.connection.close()


def start_processes(ranks: int) -> None:
    """Start the processes of all ranks but the first, for `take_processes`."""
    while len(_waiting) < ranks - 1:
        _waiting.append(_start())


def take_processes(ranks: int) -> list[RankHandle]:
    """Return the processes of all ranks but the first; start those that are not there."""
    start_processes(ranks)
    taken = _waiting[: ranks - 1]
    del _waiting[: ranks - 1]
    return taken


def _start() -> RankHandle:
    own, other = Pipe()
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", PROGRAM, str(other.fileno())],
        pass_fds=[other.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR"},
    )
    other.close()
    return RankHandle(process, own)
