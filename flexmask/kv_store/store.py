"""The store of keys and values of spans: it is asked by identity, and has three tiers.

A *span* is a run of prompt tokens that see only themselves, causally, and a chain of ancestor
spans. Its keys and values depend on nothing else, so they are computed once and used wherever the
span occurs. Its *identity* is a digest of all they depend on, which the engine computes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from flexmask.kv_store.counters import FolderCounters, StoreCounters, TierCounters
from flexmask.kv_store.device_copy import DeviceCopy, HostCopy, Moment
from flexmask.kv_store.folder_reader import FolderReader
from flexmask.kv_store.folder_writer import FolderWriter, Written
from flexmask.kv_store.host_memory import HostMemory, held_bytes
from flexmask.kv_store.kv_format import KVFormat
from flexmask.kv_store.memory_tier import MemoryTier
from flexmask.kv_store.span_folder import SpanFolder
from flexmask.kv_store.span_header import IDENTITY_BYTES, SpanHeader
from flexmask.kv_store.span_values import SpanValues

TOUCH_INTERVAL_S = 60
"""The use of a span in memory is recorded in the folder at most once in so many seconds."""


class KVStore:
    """Keys and values of spans by identity: on the device, in host memory, and in a folder.

    Each tier is bounded in bytes, and spans that were not used for longest leave first. `put`
    keeps a span on the device and has it written to the folder. A span that leaves the device
    moves to host memory, and from there to nowhere. `get` brings it back to the device; its copy
    in host memory stays, so that it can leave the device again without being copied.

    On a CPU there is one tier of memory, whose bound is ``device_bytes``. What `get` has returned
    lives as long as it is used, also after it has left. Beside the tiers, host memory holds the
    few spans that are being read, and at most `folder_writer.MAX_WAITING_BYTES` that wait to be
    written to the folder; `put` waits for the others.

    Any thread may use a store. It is a context manager, whose end writes what waits.
    """

    def __init__(
        self,
        kv_format: KVFormat,
        *,
        device: torch.device,
        device_bytes: int,
        host_bytes: int = 0,
        folder: Path | None = None,
        folder_bytes: int = 0,
    ) -> None:
        """Make an empty store, or one with the spans of a folder.

        Args:
            kv_format: What all spans have in common.
            device: The device of the model.
            device_bytes: Bound of the memory on the device; 0 for no such tier.
            host_bytes: Bound of the host memory beside a GPU; 0 for no such tier.
            folder: A folder of spans, which is made if it does not exist; None for no such tier.
            folder_bytes: Bound of the folder's files.

        Raises:
            KVStoreError: If the folder has spans of another model or format, or cannot be written.
            ValueError: If a bound is negative, or one is missing for the folder.
        """
        if min(device_bytes, host_bytes, folder_bytes) < 0 or (folder and not folder_bytes):
            raise ValueError(
                f"bounds must be at least 0, and that of a folder positive, got {device_bytes=}, "
                f"{host_bytes=}, {folder_bytes=}"
            )
        self._format = kv_format
        self._device = torch.empty(0, device=device).device  # with its index
        self._has_host = has_host_tier(self._device)
        self._on_device: MemoryTier[DeviceCopy] = MemoryTier(device_bytes)
        self._on_host: MemoryTier[HostCopy] = MemoryTier(host_bytes if self._has_host else 0)
        self._host_memory = HostMemory(
            self._on_host.max_bytes, is_pinned=self._device.type == "cuda"
        )
        self._lock = threading.Lock()
        self._folder: SpanFolder | None = None
        if folder is not None:
            self._folder = SpanFolder(folder, kv_format, folder_bytes)
            self._writer = FolderWriter(self._folder)
            self._reader = FolderReader(self._folder, self._allocated, self._device)
        self._used: set[bytes] = set()
        self._used_since_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(is_raised=error is None)

    @property
    def counters(self) -> StoreCounters:
        """The counts of all tiers so far."""
        return StoreCounters(
            TierCounters(**self._on_device.counts.values()),
            TierCounters(**self._on_host.counts.values()),
            FolderCounters(**(self._folder.counts.values() if self._folder else {})),
        )

    @property
    def held_bytes(self) -> tuple[int, int]:
        """Bytes that are held on the device and in host memory."""
        return self._on_device.num_bytes, self._on_host.num_bytes

    def contains(self, identity: bytes) -> bool:
        """Return True if `get` would find a span, unless its file is damaged or removed."""
        _check_identity(identity)
        with self._lock:
            if identity in self._on_device or identity in self._on_host:
                return True
        return self._is_in_folder(identity)

    def use(self, identity: bytes) -> bool:
        """Return True if `get` would find a span, as `contains` does; it counts as used now."""
        if not self.contains(identity):
            return False
        with self._lock:
            self._on_device.use(identity)
            self._on_host.use(identity)
            if self._folder is not None:
                self._record_use(identity)
        return True

    def get(self, identity: bytes) -> SpanValues | None:
        """Return the keys and values of a span, or None, as `get_all` does for several."""
        return self.get_all([identity]).get(identity)

    def get_all(self, identities: Iterable[bytes]) -> dict[bytes, SpanValues]:
        """Return the keys and values of spans on the device, for use on the current stream.

        Copies to the device are queued on that stream and not waited for. Several spans are read
        from the folder at once.

        Args:
            identities: The spans' identities, 32 bytes each.

        Returns:
            The keys and values, which must not be changed, of those that a tier has.

        Raises:
            KVStoreError: If the folder could not be written since the last call.
        """
        self._report()
        found, elsewhere = dict[bytes, SpanValues](), list[bytes]()
        for identity in dict.fromkeys(identities):
            _check_identity(identity)
            with self._lock:
                copy = self._from_memory(identity)
                if copy is not None and self._folder is not None:
                    self._record_use(identity)
            if copy is None:
                elsewhere.append(identity)
            else:
                found[identity] = copy.usable_values()
        if self._folder is not None:
            for identity, copy in self._from_folder(elsewhere, self._folder):
                found[identity] = copy.usable_values()
        return found

    def put(self, identity: bytes, values: SpanValues) -> None:
        """Keep the keys and values of a span, which all tiers may have already.

        Args:
            identity: The span's identity, 32 bytes; equal identities have equal values.
            values: The tensors, on the device. They are not copied where they are contiguous and
                no parts of larger ones, so nobody may change them any more.

        Raises:
            KVStoreError: If the folder could not be written since the last call.
            ValueError: If the tensors are not of the store's format and device.
        """
        _check_identity(identity)
        values.check(self._format, self._device)
        self._report()
        is_written = self._folder is not None and not self._is_in_folder(identity)
        with self._lock:
            copy = self._on_device.use(identity)
            if copy is None:
                copy = DeviceCopy(values.compact(), Moment.now(self._device))
                self._keep_on_device(identity, copy)
            written: Written | None = copy.values
            if self._has_host:
                is_kept = identity in self._on_device
                written = None
                if is_written or not is_kept:
                    written = self._copy_to_host(identity, copy, is_needed=is_written)
        if is_written and written is not None:
            self._writer.write(identity, written)

    def flush(self) -> None:
        """Wait until the folder has all spans that were put.

        Raises:
            KVStoreError: If it could not be written.
        """
        if self._folder is not None:
            self._writer.flush()
            self._report()

    def close(self) -> None:
        """Write what waits, and end the threads. The store must not be used afterwards.

        Raises:
            KVStoreError: If the folder could not be written.
        """
        self._close(is_raised=True)

    def _close(self, *, is_raised: bool) -> None:
        if self._folder is not None:
            self._writer.close()
            self._reader.close()
            self._folder.close()
            self._writer.report(is_raised=is_raised)

    def _report(self) -> None:
        if self._folder is not None:
            self._writer.report()

    def _is_in_folder(self, identity: bytes) -> bool:
        if self._folder is None:
            return False
        return self._writer.waiting(identity) is not None or self._folder.has(identity)

    def _record_use(self, identity: bytes) -> None:
        now_s = time.monotonic()
        if now_s - self._used_since_s >= TOUCH_INTERVAL_S:
            self._used.clear()
            self._used_since_s = now_s
        if identity not in self._used:
            self._used.add(identity)
            self._writer.touch(identity)

    def _from_memory(self, identity: bytes) -> DeviceCopy | None:
        if (copy := self._on_device.look_up(identity)) is not None:
            return copy
        if (host_copy := self._on_host.look_up(identity)) is not None:
            self._on_host.counts.add(bytes_out=host_copy.num_bytes)
            return self._promoted(identity, host_copy)
        return None

    def _from_folder(
        self, identities: Sequence[bytes], folder: SpanFolder
    ) -> Iterator[tuple[bytes, DeviceCopy]]:
        """Yield spans that are in the folder or wait to be written, and keep them in memory."""
        waiting = {identity: self._writer.waiting(identity) for identity in identities}
        read = self._reader.read([one for one in identities if waiting[one] is None])
        for identity in identities:
            span = waiting[identity] or next(read)
            if span is None:
                folder.counts.add(misses=1)
                continue
            folder.counts.add(hits=1, bytes_out=span.num_bytes)
            with self._lock:
                # Another thread may have read it, too.
                copy = self._on_device.use(identity) or self._kept(identity, span)
            yield identity, copy

    def _kept(self, identity: bytes, span: Written) -> DeviceCopy:
        if isinstance(span, HostCopy):
            self._keep_on_host(identity, span)
            return self._promoted(identity, span)
        copy = DeviceCopy(span, Moment.now(self._device))
        self._keep_on_device(identity, copy)
        return copy

    def _allocated(self, header: SpanHeader) -> Written:
        size = (header.num_tokens, header.first_position)
        if not self._has_host:
            return SpanValues.empty(self._format, *size, self._device)
        num_bytes = self._format.num_bytes(header.num_tokens)
        return HostCopy(self._host_memory, num_bytes, *size)

    def _promoted(self, identity: bytes, host_copy: HostCopy) -> DeviceCopy:
        is_kept = self._makes_room_on_device(host_copy.num_bytes)
        copy = host_copy.to_device(self._format, self._device)
        if is_kept:
            self._add_to_device(identity, copy)
        return copy

    def _keep_on_device(self, identity: bytes, copy: DeviceCopy) -> None:
        if self._makes_room_on_device(copy.values.num_bytes):
            self._add_to_device(identity, copy)

    def _makes_room_on_device(self, num_bytes: int) -> bool:
        """Move spans to host memory until so many bytes fit; False if they never do."""
        if not self._on_device.takes(num_bytes):
            return False
        for other, evicted in self._on_device.make_room(num_bytes):
            self._copy_to_host(other, evicted, is_needed=False)
        return True

    def _add_to_device(self, identity: bytes, copy: DeviceCopy) -> None:
        self._on_device.counts.add(bytes_in=copy.values.num_bytes)
        self._on_device.add(identity, copy, copy.values.num_bytes)

    def _copy_to_host(
        self, identity: bytes, copy: DeviceCopy, *, is_needed: bool
    ) -> HostCopy | None:
        """Copy a span to host memory, unless it is there or does not fit.

        Args:
            identity: Its identity.
            copy: The span on the device.
            is_needed: True to copy it in any case, for the writer.
        """
        if (there := self._on_host.use(identity)) is not None:
            return there
        num_bytes = copy.values.num_bytes
        fits = self._on_host.takes(held_bytes(num_bytes))
        if not (fits or is_needed):
            return None
        if fits:
            self._on_host.make_room(held_bytes(num_bytes))
        self._on_device.counts.add(bytes_out=num_bytes)
        host_copy = HostCopy.of(copy, self._host_memory)
        if fits:
            self._add_to_host(identity, host_copy)
        return host_copy

    def _keep_on_host(self, identity: bytes, host_copy: HostCopy) -> None:
        if self._on_host.use(identity) is None and self._on_host.takes(host_copy.held_bytes):
            self._on_host.make_room(host_copy.held_bytes)
            self._add_to_host(identity, host_copy)

    def _add_to_host(self, identity: bytes, host_copy: HostCopy) -> None:
        self._on_host.counts.add(bytes_in=host_copy.num_bytes)
        self._on_host.add(identity, host_copy, host_copy.held_bytes)


def has_host_tier(device: torch.device) -> bool:
    """Return True if a device has memory of its own, beside which there is host memory."""
    return device.type == "cuda"


def _check_identity(identity: bytes) -> None:
    if len(identity) != IDENTITY_BYTES:
        raise ValueError(f"an identity must have {IDENTITY_BYTES} bytes, got {len(identity)}")
