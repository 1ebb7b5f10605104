"""Reads spans from the folder, several at once."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice

import torch

from flexmask.errors import FlexMaskWarning
from flexmask.kv_store.folder_files import place_of
from flexmask.kv_store.folder_writer import Written
from flexmask.kv_store.span_folder import SpanFolder
from flexmask.kv_store.span_header import DamagedSpan, SpanHeader

READ_AT_ONCE = 4
"""Spans that are read at once, so that the folder's threads do not wait for the last bytes of one
before they read another."""


class FolderReader:
    """Threads that read spans. Files that cannot be used are counted, and the first is told of."""

    def __init__(
        self,
        folder: SpanFolder,
        allocate: Callable[[SpanHeader], Written],
        device: torch.device,
    ) -> None:
        """Read nothing.

        Args:
            folder: The folder.
            allocate: Returns memory for the tensors of a span; called in any thread.
            device: The device of the model, on which threads allocate.
        """
        self._folder = folder
        self._allocate = allocate
        self._has_told = False
        self._pool = ThreadPoolExecutor(
            READ_AT_ONCE, "flexmask-span-reader", initializer=partial(_use_device, device)
        )

    def read(self, identities: Sequence[bytes]) -> Iterator[Written | None]:
        """Yield the tensors of each span; None if the folder does not have them as written.

        At most `READ_AT_ONCE` are in memory beside those that the caller holds.
        """
        upcoming = iter(identities)
        reads = deque(map(self._start, islice(upcoming, READ_AT_ONCE)))
        while reads:
            span = self._outcome(*reads.popleft())
            yield span
            del span
            reads.extend(map(self._start, islice(upcoming, 1)))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _start(self, identity: bytes) -> tuple[bytes, Future[Written | None]]:
        return identity, self._pool.submit(self._read, identity)

    def _read(self, identity: bytes) -> Written | None:
        found: list[Written] = []

        def allocate(header: SpanHeader) -> list[memoryview]:
            found.append(self._allocate(header))
            return found[0].buffers()

        header = self._folder.read(identity, allocate)
        return None if header is None else found[0]

    def _outcome(self, identity: bytes, read: Future[Written | None]) -> Written | None:
        try:
            return read.result()
        except DamagedSpan as error:
            self._folder.counts.add(damaged=1)
            self._tell_once(identity, f"damaged, and removed: {error}")
        except OSError as error:
            self._folder.counts.add(unreadable=1)
            self._tell_once(identity, f"cannot be read ({error.strerror or error})")
        return None

    def _tell_once(self, identity: bytes, problem: str) -> None:
        if self._has_told:
            return
        self._has_told = True
        path = self._folder.path.joinpath(*place_of(identity))
        warnings.warn(
            f"{path}: {problem}; its keys and values are computed again. Other such files are "
            "counted and not told of",
            FlexMaskWarning,
            stacklevel=6,
        )


def _use_device(device: torch.device) -> None:
    """Let this thread pin memory for a GPU without waking another one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
