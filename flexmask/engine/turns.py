"""Turn-taking between the runs of a process, which may be in several threads."""

from __future__ import annotations

from threading import RLock
from typing import Protocol
from weakref import ref

TURN = RLock()
"""Held while an engine is made, and while prompts are started or decoded.

There is one lock for all engines of a process, because they change settings of the process: those
of torch's compiler (`flexmask.torch_internals.compile_settings`), and the default dtype, which
transformers sets while it loads a model. It is never held while a caller has control, that is
while results are handed out or prompts are tokenized.
"""


class Settles(Protocol):
    """A user of an executor that may hold it for several turns."""

    def settle(self) -> None:
        """Finish what is under way; from then on, expect the executor to be prepared again."""


class Occupancy:
    """The user that prepared an executor last; the executor holds the batch of one at a time."""

    def __init__(self) -> None:
        """Start without a user."""
        self._occupant: ref[Settles] | None = None

    def admit(self, user: Settles) -> None:
        """Give the executor to ``user``, after its current user has finished what is under way.

        Call it with `TURN` held. A user that has been garbage-collected has nothing to finish.
        """
        current = None if self._occupant is None else self._occupant()
        if current is user:
            return
        # No user if finishing is interrupted, because the executor's state is unknown then.
        self._occupant = None
        if current is not None:
            current.settle()
        self._occupant = ref(user)
