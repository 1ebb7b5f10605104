"""A process that holds one rank of a model, and repeats the calls that rank 0 sends it.

It is started as ``python -m flexmask.engine.rank_process FD``, with one end of a socket. It ends
when rank 0 does, whatever it is doing.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from flexmask.engine.executor import Executor
from flexmask.engine.memory import free_bytes
from flexmask.engine.prefill_plan import PrefillPlan
from flexmask.engine.rank_group import RankSpec, join_group, make_store
from flexmask.engine.rank_messages import END, from_bytes
from flexmask.engine.ranks import Call, Ranks, outcome_of
from flexmask.errors import FlexMaskError, FlexMaskWarning
from flexmask.tensor_parallel.collectives import begun


class RankProcess:
    """One rank: its connection to rank 0, and its executor once that is made."""

    def __init__(self, connection: Connection) -> None:
        """Start to listen to rank 0, in a thread that ends the process when rank 0 ends.

        Args:
            connection: The connection to rank 0.
        """
        self._connection = connection
        self._received: SimpleQueue[bytes] = SimpleQueue()
        self._own: dict[str, Any] = {}
        Thread(target=self._listen, daemon=True).start()

    def run(self) -> None:
        """Become the rank that rank 0 asks for, and repeat its calls; does not return."""
        try:
            spec = self._next()
            assert isinstance(spec, RankSpec)
            executor = self._start(spec)
            while True:
                message = self._next()
                if isinstance(message, Call):
                    self._repeat(message, executor)
                else:
                    self._send("answer", free_bytes(spec.device))
        except BaseException as error:
            reason = " ".join(str(error).split()) or "no reason given"
            is_known = isinstance(error, FlexMaskError)
            self._send("failed", reason if is_known else f"{type(error).__name__}: {reason}")
            os._exit(1)  # at its usual end, a process would wait for collectives

    def _start(self, spec: RankSpec) -> Executor:
        torch.set_float32_matmul_precision(spec.precision)
        self._send("answer", "started")
        join_group(spec, make_store(spec.port, spec.place.size, is_first=False))
        model = self._own["model"] = spec.load_shard(spec.place, spec.device)
        self._send("answer", "loaded")
        return Executor(model, spec.prefill_kernel, Ranks(spec.place.size))

    def _repeat(self, call: Call, executor: Executor) -> None:
        """Make a call of rank 0; an error that rank 0 must have too is left to it."""
        raised: Exception | None = None
        before = begun()
        try:
            part = executor if call.role == "executor" else getattr(executor, call.role)
            method: Any = getattr(part, call.method)
            result = method(*call.args, **call.options)
            if isinstance(result, PrefillPlan):
                self._own["plan"] = result
        except Exception as error:
            if not call.is_answered:
                raise
            raised = error
        if call.is_answered:
            self._send("answer", outcome_of(call, raised, before))

    def _listen(self) -> None:
        """Put what rank 0 sends into a queue."""
        try:
            while (content := self._connection.recv_bytes()) != END:
                self._received.put(content)
        except (EOFError, OSError):
            pass  # rank 0 has ended
        os._exit(0)  # whatever the main thread waits for, such as a collective, never comes

    def _next(self) -> object:
        return from_bytes(self._received.get(), self._own)

    def _send(self, kind: str, content: object) -> None:
        self._connection.send((kind, content))


def main() -> None:
    """Run a rank; Ctrl-C, which all processes of a terminal get, is left to rank 0."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore", FlexMaskWarning)  # rank 0 warns of the same
    RankProcess(Connection(int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
