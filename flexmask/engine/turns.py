"""Turns of the runs of a process, which may be in several threads."""

from __future__ import annotations

from threading import RLock
from typing import Protocol
from weakref import ref

TURN = RLock()
"""Held while an engine is made and while a batch is prepared, started or finished.

One for all engines of a process, because settings that they need are the process's: those of
torch's compiler (`flexmask.attention.compile_settings`), and the default dtype that transformers
sets while it loads a model. Never held while a caller has control: not while results are handed
out, and not while prompts are tokenized.
"""


class Settles(Protocol):
    """Something that uses an engine for several turns."""

    def settle(self) -> None:
        """Finish what is under way, and take it that the engine is another's from now on."""


class Occupancy:
    """Who prepared an engine last; it holds one batch at a time."""

    def __init__(self) -> None:
        """Begin with nobody."""
        self._occupant: ref[Settles] | None = None

    def admit(self, user: Settles) -> None:
        """Let ``user`` have the engine; what another has under way is finished first.

        Call it with `TURN` held. A user that nobody holds any more has nothing to finish.
        """
        current = None if self._occupant is None else self._occupant()
        if current is user:
            return
        # Nobody's, should finishing be interrupted: what is there then is of no use to anyone.
        self._occupant = None
        if current is not None:
            current.settle()
        self._occupant = ref(user)
