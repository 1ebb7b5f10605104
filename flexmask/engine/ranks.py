"""The processes that hold a model together under tensor parallelism, a rank each.

Rank 0 is the process that the user started. It alone tokenizes, schedules and returns results.
Each other rank is a process with an executor of its own, that repeats what rank 0 does with its
executor: rank 0 sends a call before it makes the call itself (`on_all_ranks`). So all ranks run
the same kernels in the same order, and their collectives meet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import torch

from flexmask.engine.memory import free_bytes, is_out_of_memory
from flexmask.errors import FlexMaskError
from flexmask.tensor_parallel.collectives import begun

Role = Literal["executor", "runner", "loop"]
"""The part of an executor that makes a call."""

Outcome = tuple[Literal["done", "memory", "lost", "error"], int]
"""The end of a call, and the number of collectives that it began.

With ``memory`` there was too little of it, and the rank's collectives are those of a rank that had
enough; with ``lost`` they may not be.
"""

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
    def waiting(self, what: str = "the device", *, is_limited: bool = True) -> Iterator[None]:
        """Wait for the device or another rank in this context.

        Args:
            what: What is waited for, for a message.
            is_limited: Whether to wait for too long is a failure.

        Raises:
            RankError: If another rank has failed, so that what was computed is not usable.
        """
        yield

    def least_free_bytes(self, device: torch.device) -> int | None:
        """Return the memory that every rank can allocate; None if it is not known."""
        return free_bytes(device)

    def close(self) -> None:
        """End the other ranks."""


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
