"""The processes that hold a model together under tensor parallelism, a rank each.

Rank 0 is the process that the user started. It alone tokenizes, schedules and returns results.
Each other rank is a process with an executor of its own, that repeats what rank 0 does with its
executor: rank 0 sends a call before it makes the call itself (`on_all_ranks`). So all ranks run
the same kernels in the same order, and their collectives meet.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Queue
from threading import RLock, Thread
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from flexmask.attention.flex_call import PrefillKernel
from flexmask.device import resolve_device
from flexmask.engine.memory import free_bytes, is_out_of_memory
from flexmask.engine.prefill_plan import PrefillPlan
from flexmask.errors import FlexMaskError, OptionError, RankError
from flexmask.layout import Layout
from flexmask.plugins.strategy_file import FILE_MODULES, strategy_in_module
from flexmask.tensor_parallel.collectives import begun
from flexmask.tensor_parallel.plan import RankOf
from flexmask.torch_internals import abort_collectives

GRACE_S = 20.0
"""Seconds that rank 0 has to stop waiting for another rank that has failed."""

TIMEOUT = timedelta(hours=1)
"""Time that a rank waits for others, which may be compiling."""

END = b"end"
"""The message that ends a rank."""

Role = Literal["executor", "runner", "loop"]
"""Which part of an executor makes a call."""

Outcome = tuple[Literal["done", "memory", "lost", "error"], int]
"""How a call ended, and how many collectives it began.

With ``memory`` there was too little of it, and the rank's collectives are those of a rank that had
enough; with ``lost`` they may not be.
"""

LoadShard = Callable[[RankOf, torch.device], PreTrainedModel]
"""Loads the shard of a rank to its device; every process imports it by its name."""

P = ParamSpec("P")
R = TypeVar("R")


class SharedOutOfMemory(torch.OutOfMemoryError):
    """A rank ran out of memory, and has taken part in all sums that others compute."""


class HasRanks(Protocol):
    """A part of an executor."""

    @property
    def ranks(self) -> Ranks:
        """The processes that hold the model."""


SelfT = TypeVar("SelfT", bound=HasRanks)


@dataclass(frozen=True)
class Call:
    """A call of a method of an executor's part.

    Attributes:
        role: The part.
        method: Name of the method.
        args: Its arguments.
        options: Its keyword arguments.
        is_answered: Whether each rank answers how the call ended.
        computes: Whether it begins collectives.
    """

    role: Role
    method: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    is_answered: bool
    computes: bool


def on_all_ranks(
    role: Role, *, is_answered: bool = True, computes: bool = False
) -> Callable[[Callable[Concatenate[SelfT, P], R]], Callable[Concatenate[SelfT, P], R]]:
    """Make a method run on all ranks, whoever calls it on rank 0.

    Args:
        role: The part of an executor whose method it is.
        is_answered: Whether rank 0 waits until the others have made the call, to compare how it
            ended. Without that, an error on another rank ends the run.
        computes: Whether the method begins collectives.
    """

    def decorate(
        method: Callable[Concatenate[SelfT, P], R],
    ) -> Callable[Concatenate[SelfT, P], R]:
        @functools.wraps(method)
        def on_all(self: SelfT, /, *args: P.args, **options: P.kwargs) -> R:
            call = Call(role, method.__name__, args, options, is_answered, computes)
            return self.ranks.call(call, lambda: method(self, *args, **options))

        return on_all

    return decorate


class Ranks:
    """The ranks as a process sees them that does not lead others.

    Attributes:
        size: Number of ranks; 1 without tensor parallelism.
    """

    def __init__(self, size: int = 1) -> None:
        """Store the number."""
        self.size = size

    def call(self, call: Call, run: Callable[[], R]) -> R:
        """Make a call on all ranks.

        Args:
            call: The call.
            run: Makes it in this process.
        """
        return run()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for the device in this context.

        Raises:
            RankError: If another rank has failed, so that what was computed is not usable.
        """
        yield

    def least_free_bytes(self, device: torch.device) -> int | None:
        """Return the memory that every rank can allocate; None if it is not known."""
        return free_bytes(device)

    def close(self) -> None:
        """End the other ranks."""


@dataclass(frozen=True)
class RankSpec:
    """All that a process needs to become a rank.

    Attributes:
        place: The rank.
        port: Port of the store by which ranks find each other.
        device_type: ``cpu`` or ``cuda``.
        load_shard: Loads the rank's shard.
        prefill_kernel: The kernel that computes prompts; None to choose.
        threads: Threads of torch.
        precision: Precision of products in float32.
    """

    place: RankOf
    port: int
    device_type: str
    load_shard: LoadShard
    prefill_kernel: PrefillKernel | None
    threads: int
    precision: str

    @property
    def device(self) -> torch.device:
        """The rank's device."""
        return rank_device(self.device_type, self.place.rank)


def device_of_ranks(device: str, size: int) -> str:
    """Return the type of the device of ranks.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        size: Number of ranks.

    Raises:
        OptionError: If there are fewer GPUs than ranks, or the device names one GPU.
    """
    if device.startswith("cuda:"):
        raise OptionError(
            f"`tensor_parallel={size}` takes the first GPUs; pass `device=cuda`, got {device!r}, "
            "and choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    kind = resolve_device(device).type
    if kind == "cuda" and torch.cuda.device_count() < size:
        raise OptionError(
            f"`tensor_parallel={size}` needs {size} GPUs, and torch sees "
            f"{torch.cuda.device_count()}"
        )
    return kind


def rank_device(device_type: str, rank: int) -> torch.device:
    """Return the device of a rank: the GPU of its number, or the CPU."""
    return torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")


def make_store(port: int, size: int, *, is_first: bool) -> Any:
    """Make the store by which ranks find each other.

    Args:
        port: Its port; 0 for one that is free.
        size: Number of ranks.
        is_first: True in rank 0, which others reach.
    """
    store: Any = dist  # whose stubs leave it out
    return store.TCPStore("127.0.0.1", port, size, is_master=is_first, wait_for_workers=False)


def join_group(spec: RankSpec, store: Any) -> None:
    """Join the group of all ranks, by NCCL on GPUs and gloo on CPUs."""
    on_gpu = spec.device_type == "cuda"
    if on_gpu:
        torch.cuda.set_device(spec.device)
    torch.set_num_threads(spec.threads)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=spec.place.rank,
        world_size=spec.place.size,
        timeout=TIMEOUT,
        device_id=spec.device if on_gpu else None,
    )


def leave_group(device_type: str) -> None:
    """Leave the group of all ranks, without waiting for the others."""
    if dist.is_initialized():
        if device_type == "cuda":
            abort_collectives()
        else:
            dist.destroy_process_group()


@dataclass(frozen=True)
class _Worker:
    """Another rank, as rank 0 sees it."""

    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection
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
        """Start the other ranks, which load their shards; see `loaded`.

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
        self._failure: str | None = None
        self._is_closed = False
        self._device_type = device_type
        store = make_store(0, size, is_first=True)
        threads = max(1, torch.get_num_threads() // size)
        self._spec = RankSpec(
            RankOf(0, size), store.port, device_type, load_shard, prefill_kernel, threads,
            torch.get_float32_matmul_precision(),
        )  # fmt: skip
        self._workers = [_start(rank) for rank in range(1, size)]
        for worker in self._workers:
            Thread(target=self._listen, args=(worker,), daemon=True).start()
        try:
            for worker in self._workers:
                place = RankOf(worker.rank, size)
                self._send([worker], RankSpec(**{**vars(self._spec), "place": place}))
            self._await("started")
            with self.waiting():
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
        self._await("loaded")
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
                with self.waiting():
                    self._send(self._workers, call)
                    return self._made(call, run)
            except Exception:
                raise
            except BaseException:  # Ctrl-C: the ranks are at different places now
                self._fail("the run was interrupted")
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
    def waiting(self) -> Iterator[None]:
        """Wait for the device or another rank in this context.

        Raises:
            RankError: If another rank has failed.
        """
        self._depth += 1
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
        self._check()

    def least_free_bytes(self, device: torch.device) -> int | None:
        """Return the memory that every rank can allocate; on a CPU, its share of what is free."""
        with self._lock, self.waiting():
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
                worker.connection.send_bytes(END)
        for worker in self._workers:
            try:
                worker.process.wait(timeout=GRACE_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.connection.close()
        leave_group(self._device_type)

    def _send(self, workers: Sequence[_Worker], message: object) -> None:
        content = _pickled(message)
        for worker in workers:
            try:
                worker.connection.send_bytes(content)
            except OSError:
                self._look_for_failure()
                self._check()
                raise

    def _await(self, message: str) -> None:
        """Wait until all ranks have sent a message."""
        with self.waiting():
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
                kind, content = worker.connection.recv()
                if kind == "failed":
                    self._fail(f"rank {worker.rank} of {self.size} failed: {content}")
                else:
                    worker.answers.put(content)
        except (EOFError, OSError):
            if not self._is_closed:
                self._fail(f"rank {worker.rank} of {self.size} {_ending(worker.process)}")

    def _fail(self, reason: str) -> None:
        """Note why the ranks cannot go on, and make rank 0 stop waiting for others."""
        if self._failure is not None or self._is_closed:
            return
        self._failure = reason
        for worker in self._workers:
            worker.answers.put(None)
        if self._depth:
            Thread(target=self._stop_waiting, daemon=True).start()

    def _stop_waiting(self) -> None:
        """Abort what rank 0 waits for; if it waits nevertheless, end the process."""
        if self._device_type == "cuda":
            leave_group(self._device_type)
        deadline = time.monotonic() + GRACE_S
        while self._depth and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._depth:
            sys.stderr.write(f"error: {self._failure}\n")
            sys.stderr.flush()
            os._exit(1)

    def _look_for_failure(self) -> None:
        """Give the listening threads time to note the failure that an error comes from."""
        deadline = time.monotonic() + 5
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _check(self, cause: Exception | None = None) -> None:
        if self._failure is not None:
            raise RankError(self._failure) from cause


def outcome_of(call: Call, error: Exception | None, before: int) -> Outcome:
    """Return how a call ended, to be compared with the other ranks.

    Args:
        call: The call.
        error: The error that it raised; None for none.
        before: Collectives that the process had begun before the call.

    Raises:
        Exception: The error itself, if no other rank can be expected to have it too.
    """
    count = begun() - before
    if error is None:
        return "done", count
    if is_out_of_memory(error):
        is_together = isinstance(error, SharedOutOfMemory) or not call.computes
        return ("memory" if is_together else "lost"), count
    if isinstance(error, FlexMaskError):
        return "error", count
    raise error


def _start(rank: int) -> _Worker:
    """Start a process that becomes a rank once it gets its `RankSpec`."""
    own, other = Pipe()
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", "flexmask.engine.rank_process", str(other.fileno())],
        pass_fds=[other.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR"},
    )
    other.close()
    return _Worker(rank, process, own)


def _ending(process: subprocess.Popen[bytes]) -> str:
    """Say how a process ended whose connection is closed."""
    try:
        status = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _may_be_of_another_rank(error: BaseException) -> bool:
    """Return True for an error that a collective raises if another rank has ended."""
    if isinstance(error, FlexMaskError):
        return error.__cause__ is not None and _may_be_of_another_rank(error.__cause__)
    return isinstance(error, RuntimeError) and not is_out_of_memory(error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Pickler(pickle.Pickler):
    """Pickles calls. Each rank has its own model and plans, and runs strategy files itself."""

    def persistent_id(self, obj: Any) -> tuple[str, ...] | None:
        if isinstance(obj, PreTrainedModel):
            return ("model",)
        if isinstance(obj, PrefillPlan):
            return ("plan",)
        if isinstance(obj, type) and obj.__module__.startswith(FILE_MODULES):
            file = str(sys.modules[obj.__module__].__file__)
            return ("file", file, obj.__module__, obj.__qualname__)
        if isinstance(obj, type) and obj.__module__ == "__main__":
            raise pickle.PicklingError(f"{obj.__name__} is defined in __main__")
        return None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Layout:
            return NotImplemented
        return _known_layout, tuple(getattr(obj, one.name) for one in fields(Layout))


@functools.lru_cache(maxsize=2048)
def _known_layout(*values: Any) -> Layout:
    """Return a layout: the same object for equal ones, so that it is looked at once."""
    return Layout(*values)


class Unpickler(pickle.Unpickler):
    """Reads what rank 0 has sent."""

    def __init__(self, content: bytes, own: Mapping[str, Any]) -> None:
        """Prepare to read.

        Args:
            content: What was sent.
            own: This rank's objects for those that are named: ``model`` and ``plan``.
        """
        super().__init__(io.BytesIO(content))
        self._own = own

    def persistent_load(self, pid: tuple[str, ...]) -> Any:
        """Return this rank's object of a name, or the strategy of a file."""
        kind, *place = pid
        if kind != "file":
            return self._own[kind]
        path, module, name = place
        return strategy_in_module(Path(path), module, name)


def _pickled(message: object) -> bytes:
    """Pickle a message for another process.

    Raises:
        OptionError: If that process cannot import something in it, such as a strategy that is
            defined in a notebook.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(message)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise OptionError(
            f"`tensor_parallel`: other processes cannot import what this run uses ({_line(error)})"
            "; define strategies in a module or a file"
        ) from error
    return buffer.getvalue()
