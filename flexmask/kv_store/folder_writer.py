"""Writes spans to the folder in a thread."""

from __future__ import annotations

import errno
import threading
import warnings

from flexmask.errors import FlexMaskWarning, KVStoreError
from flexmask.kv_store.device_copy import HostCopy
from flexmask.kv_store.span_folder import SpanFolder
from flexmask.kv_store.span_values import SpanValues

MAX_WAITING_BYTES = 256 << 20
"""Bytes of the spans that wait to be written; whoever brings more waits too."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, an exhausted quota and a limit of the process."""

Written = SpanValues | HostCopy
"""The tensors to write. Those of a GPU are copied to host memory first."""


class FolderWriter:
    """A thread that writes spans, and records that others are used.

    After an error nothing more is written. `report` raises it, or warns if the disk is full.
    """

    def __init__(self, folder: SpanFolder) -> None:
        """Start the thread."""
        self._folder = folder
        self._changed = threading.Condition()
        self._waiting: dict[bytes, Written] = {}
        self._waiting_bytes = 0
        self._used: set[bytes] = set()
        self._is_busy = False
        self._is_closed = False
        self._is_stopped = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="flexmask-span-writer", daemon=True)
        self._thread.start()

    def write(self, identity: bytes, span: Written) -> None:
        """Have a span written; waits while too many bytes wait."""
        num_bytes = span.num_bytes
        with self._changed:
            if identity in self._waiting:
                return
            self._changed.wait_for(
                lambda: (
                    self._is_stopped
                    or not self._waiting
                    or self._waiting_bytes + num_bytes <= MAX_WAITING_BYTES
                )
            )
            if self._is_stopped:
                self._folder.counts.add(not_written=1)
                return
            self._waiting[identity] = span
            self._waiting_bytes += num_bytes
            self._changed.notify_all()

    def touch(self, identity: bytes) -> None:
        """Have the use of a span recorded, for its file to be pruned later."""
        with self._changed:
            self._used.add(identity)
            self._changed.notify_all()

    def waiting(self, identity: bytes) -> Written | None:
        """Return a span that is not written yet."""
        with self._changed:
            return self._waiting.get(identity)

    def flush(self) -> None:
        """Wait until everything is written."""
        with self._changed:
            self._changed.wait_for(self._is_idle)

    def close(self) -> None:
        """Write what waits, and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def report(self, *, is_raised: bool = True) -> None:
        """Tell of the error that ended the writing, once.

        Args:
            is_raised: False to warn of any error, while another exception is on its way.

        Raises:
            KVStoreError: If the folder could not be written, for another reason than a full disk.
            Exception: Any other error of the thread.
        """
        with self._changed:
            failure, self._failure = self._failure, None
        if failure is None:
            return
        path = self._folder.path
        if isinstance(failure, OSError):
            reason = failure.strerror or failure
            message = f"{path}: keys and values cannot be written ({reason})"
            if failure.errno not in FULL and is_raised:
                raise KVStoreError(message) from failure
            note = f"{message}; the run goes on without writing them"
            warnings.warn(note, FlexMaskWarning, stacklevel=4)
        elif is_raised:
            raise failure
        else:
            warnings.warn(f"{path}: {failure!r}", FlexMaskWarning, stacklevel=4)

    def _is_idle(self) -> bool:
        return not (self._waiting or self._used or self._is_busy)

    def _run(self) -> None:
        while self._has_work():
            with self._changed:
                used, self._used = self._used, set()
                identity, span = next(iter(self._waiting.items()), (b"", None))
                self._is_busy = True
            try:
                for other in used:
                    self._folder.touch(other)
                if span is not None:
                    self._folder.write(
                        identity, span.first_position, span.num_tokens, span.buffers()
                    )
            except Exception as error:
                self._stop(error)
            with self._changed:
                self._is_busy = False
                if self._waiting.pop(identity, None) is not None:
                    assert span is not None
                    self._waiting_bytes -= span.num_bytes
                self._changed.notify_all()

    def _has_work(self) -> bool:
        """Wait for work; False once there is none and the writer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._used or self._is_closed)
            return bool(self._waiting or self._used)

    def _stop(self, error: Exception) -> None:
        with self._changed:
            self._failure = error
            self._is_stopped = True
            self._folder.counts.add(not_written=len(self._waiting))
            self._waiting.clear()
            self._waiting_bytes = 0
