"""The ranks as rank 0 leads them: it starts their processes, and sends them its calls."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from queue import Queue
from threading import RLock, Thread
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from flexmask.attention.flex_call import PrefillKernel
from flexmask.engine.memory import free_bytes, is_out_of_memory
from flexmask.engine.rank_group import (
    LoadShard,
    RankSpec,
    join_group,
    leave_group,
    make_store,
)
from flexmask.engine.rank_messages import END, to_bytes
from flexmask.engine.ranks import Call, Ranks, outcome_of
from flexmask.errors import FlexMaskError, OptionError, RankError
from flexmask.tensor_parallel.collectives import begun
from flexmask.tensor_parallel.plan import RankOf
from flexmask.tensor_parallel.processes import RankHandle, take_processes

GRACE_S = 10.0
"""Seconds that rank 0 has to stop waiting for a failed rank, and that a rank has to end."""

LIMIT_S = 900.0
"""Seconds that the ranks have for one call, in which they may compile."""

R = TypeVar("R")


class _Wait(NamedTuple):
    """A wait of rank 0: what for, and its start by the monotonic clock."""

    what: str
    since: float


@dataclass(frozen=True)
class _Worker:
    """Another rank, as rank 0 sees it."""

    rank: int
    handle: RankHandle
    answers: Queue[Any] = field(default_factory=Queue)


class LeadingRanks(Ranks):
    """The ranks as rank 0 sees them: it starts the others, and sends them its calls.

    A rank that fails or dies ends the run with one line. Where rank 0 waits for its device
    meanwhile, the collectives are aborted, and if that does not help, the process ends. The others
    end when their connection to rank 0 does, however that comes about.
    """

    def __init__(
        self,
        size: int,
        device_type: str,
        load_shard: LoadShard,
        prefill_kernel: PrefillKernel | None = None,
    ) -> None:
        """Start the other ranks, which load their shards; `load` does it for this one.

        Args:
            size: Number of ranks, at least two.
            device_type: ``cpu`` or ``cuda``.
            load_shard: Loads the shard of a rank.
            prefill_kernel: The kernel that computes prompts on a GPU; None to choose.

        Raises:
            OptionError: If there are fewer GPUs, or `torch.distributed` is in use.
            RankError: If a rank does not start.
        """
        super().__init__(size)
        if dist.is_initialized():
            raise OptionError(
                "`tensor_parallel` starts ranks of its own, and torch.distributed is in use in "
                "this process; close the engine that uses it"
            )
        self._lock = RLock()
        self._is_calling = False
        self._depth = 0
        self._wait: _Wait | None = None
        self._failure: str | None = None
        self._is_closed = False
        self._device_type = device_type
        store = make_store(0, size, is_first=True)
        threads = max(1, torch.get_num_threads() // size)
        self._spec = RankSpec(
            RankOf(0, size), store.port, device_type, load_shard, prefill_kernel, threads,
            torch.get_float32_matmul_precision(),
        )  # fmt: skip
        self._workers = [
            _Worker(rank, handle) for rank, handle in enumerate(take_processes(size), start=1)
        ]
        for worker in self._workers:
            Thread(target=self._listen, args=(worker,), daemon=True).start()
        Thread(target=self._watch, daemon=True).start()
        try:
            for worker in self._workers:
                place = RankOf(worker.rank, size)
                self._send([worker], replace(self._spec, place=place))
            self._await("started")
            with self.waiting("a group of all ranks"):
                join_group(self._spec, store)
        except BaseException:
            self.close()
            raise

    def load(self) -> PreTrainedModel:
        """Load the shard of rank 0; returns it once all ranks have theirs.

        Raises:
            RankError: If a rank fails.
            FlexMaskError: As loading does.
        """
        model = self._spec.load_shard(self._spec.place, self._spec.device)
        self._await("loaded", is_limited=False)  # files may be far away
        return model

    def call(self, call: Call, run: Callable[[], R]) -> R:
        """Send a call to all ranks and make it; one that is part of another is not sent.

        Raises:
            RankError: If a rank fails, or the call ends differently on the ranks.
            torch.OutOfMemoryError: If a rank's memory does not suffice.
        """
        with self._lock:
            if self._is_calling:
                return run()
            self._is_calling = True
            try:
                with self.waiting(call.method):
                    self._send(self._workers, call)
                    return self._made(call, run)
            except BaseException as error:
                if not (isinstance(error, FlexMaskError) or is_out_of_memory(error)):
                    # By a fault, or Ctrl-C, the ranks are at different places now.
                    self._fail(f"rank 0 stopped in the middle ({_line(error)})")
                raise
            finally:
                self._is_calling = False

    def _made(self, call: Call, run: Callable[[], R]) -> R:
        """Make a call in this process, and compare how it ends on all ranks."""
        own: Exception | None = None
        before = begun()
        try:
            result = run()
        except Exception as error:
            if not call.is_answered:
                if is_out_of_memory(error):
                    self._fail(f"rank 0 ran out of memory ({_line(error)}); use smaller batches")
                raise
            own = error
        outcomes = [outcome_of(call, own, before)]
        if call.is_answered:
            outcomes += map(self._answer, self._workers)
        kinds = {kind for kind, _ in outcomes}
        if "error" in kinds and len(kinds) > 1:
            self._fail(f"the ranks differ in {call.method} ({own or 'an error on another rank'})")
        elif "lost" in kinds and len(set(outcomes)) > 1:
            # Some wait for collectives that others never begin.
            self._fail("a rank ran out of memory while others computed; use smaller batches")
        elif own is not None:
            raise own
        elif kinds != {"done"}:
            raise torch.OutOfMemoryError("another rank has too little memory")
        return result

    @contextmanager
    def waiting(self, what: str = "the device", *, is_limited: bool = True) -> Iterator[None]:
        """Wait for the device or another rank in this context.

        Args:
            what: What is waited for, or computed, for a message.
            is_limited: Whether more than `LIMIT_S` seconds are a failure.

        Raises:
            RankError: If another rank has failed.
        """
        self._depth += 1
        before = self._wait
        self._wait = _Wait(what, time.monotonic()) if is_limited else None
        try:
            self._check()
            yield
        except RankError:
            raise
        except Exception as error:
            if _may_be_of_another_rank(error):
                self._look_for_failure()
                self._check(error)
            raise
        finally:
            self._depth -= 1
            self._wait = before
        self._check()

    def least_free_bytes(self, device: torch.device) -> int | None:
        """Return the memory that every rank can allocate; on a CPU, its share of what is free."""
        with self._lock, self.waiting("free memory"):
            own = free_bytes(device)
            if device.type == "cpu":
                return None if own is None else own // self.size
            self._send(self._workers, "free bytes")
            found: list[int | None] = [own, *map(self._answer, self._workers)]
            return min(value for value in found if value is not None)

    def close(self) -> None:
        """End the other ranks, and leave their group."""
        if self._is_closed:
            return
        self._is_closed = True
        for worker in self._workers:
            with suppress(OSError):  # it has ended
                worker.handle.connection.send_bytes(END)
        for worker in self._workers:
            worker.handle.end(GRACE_S)
        # NCCL waits while a CUDA graph with its kernels exists, which a caller may still hold.
        leaving = Thread(target=leave_group, args=(self._device_type,), daemon=True)
        leaving.start()
        leaving.join(GRACE_S)

    def _send(self, workers: Sequence[_Worker], message: object) -> None:
        content = to_bytes(message)
        for worker in workers:
            try:
                worker.handle.connection.send_bytes(content)
            except OSError:
                self._look_for_failure()
                self._check()
                raise

    def _await(self, message: str, *, is_limited: bool = True) -> None:
        """Wait until all ranks have sent a message."""
        with self.waiting(message, is_limited=is_limited):
            for worker in self._workers:
                found = self._answer(worker)
                assert found == message, found

    def _answer(self, worker: _Worker) -> Any:
        found = worker.answers.get()
        self._check()
        return found

    def _listen(self, worker: _Worker) -> None:
        """Receive what a rank sends, in a thread, until it ends."""
        try:
            while True:
                kind, content = worker.handle.connection.recv()
                if kind == "failed":
                    self._fail(f"rank {worker.rank} of {self.size} failed: {content}")
                else:
                    worker.answers.put(content)
        except (EOFError, OSError):
            if not self._is_closed:
                self._fail(f"rank {worker.rank} of {self.size} {worker.handle.ending()}")

    def _fail(self, reason: str) -> None:
        """Note why the ranks cannot go on, and make rank 0 stop waiting for others."""
        if self._failure is not None or self._is_closed:
            return
        self._failure = reason
        for worker in self._workers:
            worker.answers.put(None)
        Thread(target=self._stop_waiting, daemon=True).start()

    def _stop_waiting(self) -> None:
        """Abort what rank 0 waits for; if it waits nevertheless, end the process."""
        if self._device_type == "cuda":
            # In a thread: it lets kernels end at once, and then waits for CUDA graphs to go.
            Thread(target=leave_group, args=(self._device_type,), daemon=True).start()
        deadline = time.monotonic() + GRACE_S
        while self._depth and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._depth:
            sys.stderr.write(f"error: {self._failure}\n")
            sys.stderr.flush()
            os._exit(1)

    def _watch(self) -> None:
        """Let rank 0 fail where it waits for too long."""
        while not self._is_closed and self._failure is None:
            time.sleep(1)
            wait = self._wait
            if wait is not None and time.monotonic() - wait.since > LIMIT_S:
                self._fail(f"the ranks have waited {LIMIT_S:.0f} s for {wait.what}")

    def _look_for_failure(self) -> None:
        """Give the listening threads time to note the failure that an error comes from."""
        deadline = time.monotonic() + 5
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _check(self, cause: Exception | None = None) -> None:
        if self._failure is not None:
            raise RankError(self._failure) from cause


def _may_be_of_another_rank(error: BaseException) -> bool:
    """Return True for an error that a collective raises if another rank has ended."""
    if isinstance(error, FlexMaskError):
        return error.__cause__ is not None and _may_be_of_another_rank(error.__cause__)
    return isinstance(error, RuntimeError) and not is_out_of_memory(error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
