"""Keys and values of spans: tiers that keep their bounds, and a folder that many share."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import flexmask
import kv_spans
from damage import DAMAGES
from flexmask.errors import FlexMaskWarning, KVStoreError
from flexmask.kv_store import folder_writer, host_memory
from flexmask.kv_store import store as store_module
from flexmask.kv_store.folder_files import DESCRIPTION, place_of
from flexmask.kv_store.folder_report import report
from flexmask.kv_store.folder_scan import LEFTOVER_AGE_S, prune, scan
from flexmask.kv_store.host_memory import HostMemory
from flexmask.kv_store.kv_format import KVFormat, LayerGroup
from flexmask.kv_store.span_folder import SpanFolder
from flexmask.kv_store.span_header import LEAF_BYTES
from flexmask.kv_store.span_values import SpanValues
from flexmask.kv_store.store import KVStore
from kv_spans import (
    CPU,
    FORMAT,
    LARGE_TOKENS,
    file_bytes,
    identity_of,
    is_span,
    open_store,
    path_of,
    span_of,
    tokens_of,
    use,
)

DEVICE_BYTES, HOST_BYTES, FOLDER_BYTES = 5_000, 4_096, 16_000
CHUNK_BYTES = 512
NUM_SPANS = 14


@dataclass(frozen=True)
class Shared:
    """Folders that several processes used, and what was printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """`kv_spans` is run once, since it takes long to import torch."""
    folder = tmp_path_factory.mktemp("shared")
    search_path = str(Path(flexmask.__file__).parents[1])
    finished = subprocess.run(
        [sys.executable, kv_spans.__file__, str(folder)],
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return Shared(folder, finished.stdout)


class Reference:
    """What a store must do, on lists of numbers.

    Its folder takes over which files there are, once it has seen that these are the right ones.
    """

    def __init__(self, folder: Path, *, has_host: bool, device_bytes: int) -> None:
        self.device: OrderedDict[int, int] = OrderedDict()
        self.host: OrderedDict[int, int] = OrderedDict()
        self.counts = {name: Counter[str]() for name in ("device", "host", "folder")}
        self._has_host = has_host
        self._device_bytes = device_bytes
        self._path = folder
        self._time = 0
        self._folder: list[int] = []  # the one used longest ago first

    def get(self, number: int) -> bool:
        if number in self.device:
            self.device.move_to_end(number)
            self.counts["device"]["hits"] += 1
            self._touch(number)
            return True
        self.counts["device"]["misses"] += self._device_bytes > 0
        if self._has_host and number in self.host:
            self.host.move_to_end(number)
            self.counts["host"] += Counter(hits=1, bytes_out=size_of(number))
            self._to_device(number)
            self._touch(number)
            return True
        self.counts["host"]["misses"] += self._has_host
        if number not in self._folder:
            self.counts["folder"]["misses"] += 1
            return False
        self.counts["folder"] += Counter(hits=1, bytes_out=size_of(number))
        if self._has_host and self._fits_host(number):
            self._to_host(number)
        self._to_device(number)
        self._touch(number)
        return True

    def put(self, number: int) -> None:
        is_new = number not in self._folder
        if number in self.device:
            self.device.move_to_end(number)
        else:
            self._to_device(number)
        if self._has_host and (is_new or number not in self.device):
            self._leave_device(number, is_needed=is_new)
        if is_new and file_bytes(number) > FOLDER_BYTES:
            self.counts["folder"]["too_large"] += 1
        elif is_new:
            self._folder.append(number)
            self.counts["folder"]["bytes_in"] += size_of(number)

    def follow_folder(self) -> None:
        """Compare the files with those that must be there, and set their times."""
        self._time += 1
        there = {it for it in range(NUM_SPANS) if path_of(self._path, it).exists()}
        kept = [it for it in self._folder if it in there]
        gone = self._folder[: len(self._folder) - len(kept)]
        assert kept == self._folder[len(gone) :]  # those used longest ago have left
        assert there == set(kept)
        if gone:
            assert sum(map(file_bytes, [gone[-1], *kept])) > FOLDER_BYTES * 15 // 16
        assert sum(map(file_bytes, kept)) <= FOLDER_BYTES
        self.counts["folder"]["evictions"] += len(gone)
        self._folder = kept
        for number in kept:
            path = path_of(self._path, number)
            if path.stat().st_mtime > 10**6:
                assert number == kept[-1]
                os.utime(path, (self._time, self._time))

    def _touch(self, number: int) -> None:
        if number in self._folder:
            self._folder.remove(number)
            self._folder.append(number)

    def _to_device(self, number: int) -> None:
        if size_of(number) > self._device_bytes:
            self.counts["device"]["too_large"] += self._device_bytes > 0
            return
        self.counts["device"]["bytes_in"] += size_of(number)
        self.device[number] = size_of(number)
        while sum(self.device.values()) > self._device_bytes:
            other, _ = self.device.popitem(last=False)
            self.counts["device"]["evictions"] += 1
            if self._has_host:
                self._leave_device(other, is_needed=False)

    def _leave_device(self, number: int, *, is_needed: bool) -> None:
        if number in self.host:
            self.host.move_to_end(number)
            return
        fits = self._fits_host(number)
        if fits or is_needed:
            self.counts["device"]["bytes_out"] += size_of(number)
        if fits:
            self._to_host(number)

    def _fits_host(self, number: int) -> bool:
        fits = held_on_host(number) <= HOST_BYTES
        self.counts["host"]["too_large"] += not fits
        return fits

    def _to_host(self, number: int) -> None:
        self.counts["host"]["bytes_in"] += size_of(number)
        self.host[number] = held_on_host(number)
        while sum(self.host.values()) > HOST_BYTES:
            self.host.popitem(last=False)
            self.counts["host"]["evictions"] += 1


def size_of(number: int) -> int:
    return FORMAT.num_bytes(tokens_of(number))


def held_on_host(number: int) -> int:
    return -(-size_of(number) // CHUNK_BYTES) * CHUNK_BYTES


@pytest.mark.parametrize(
    ("device", "has_host"),
    [
        pytest.param(CPU, False, id="cpu"),
        pytest.param(CPU, True, id="host tier on a CPU"),
        pytest.param(torch.device("cuda"), True, marks=pytest.mark.gpu, id="cuda"),
    ],
)
@pytest.mark.parametrize("device_bytes", [0, 1_000, DEVICE_BYTES])
def test_a_store_does_what_a_plain_reference_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    has_host: bool,
    device_bytes: int,
) -> None:
    monkeypatch.setattr(store_module, "has_host_tier", lambda device: has_host)
    monkeypatch.setattr(store_module, "TOUCH_INTERVAL_S", 0)
    monkeypatch.setattr(host_memory, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(host_memory, "SLAB_BYTES", 4 * CHUNK_BYTES)
    generator = random.Random(device_bytes)
    folder = tmp_path / "spans"
    reference = Reference(folder, has_host=has_host, device_bytes=device_bytes)
    largest = max(map(held_on_host, range(NUM_SPANS)))
    sizes = {"device_bytes": device_bytes, "host_bytes": HOST_BYTES, "folder_bytes": FOLDER_BYTES}
    with KVStore(FORMAT, device=device, folder=folder, **sizes) as store:
        for _ in range(150):
            number = generator.randrange(NUM_SPANS)
            identity = identity_of(number)
            if generator.random() < 0.4:
                store.put(identity, span_of(number, device))
                reference.put(number)
            else:
                is_there = store.contains(identity)
                found = store.get(identity)
                assert (found is not None) == is_there == reference.get(number)
                assert found is None or is_span(found, number)
                assert found is None or found.groups[0].keys.device.type == device.type
            store.flush()
            reference.follow_folder()
            counted = {name: Counter(counts) for name, counts in asdict(store.counters).items()}
            assert {name: +it for name, it in counted.items()} == {
                name: +it for name, it in reference.counts.items()
            }
            assert list(store._on_device._entries) == list(map(identity_of, reference.device))
            assert list(store._on_host._entries) == list(map(identity_of, reference.host))
            device_held = sum(reference.device.values())
            host_held = sum(reference.host.values())
            assert store.held_bytes == (device_held, host_held)
            # Beside the tier: a span that is written, and one that is being read.
            assert store._host_memory.num_bytes <= HOST_BYTES + 2 * largest
    assert min(reference.counts["folder"][name] for name in ("hits", "misses", "evictions")) > 0
    assert not has_host or reference.counts["host"]["evictions"] > 0


def test_spans_are_files_that_safetensors_reads(tmp_path: Path) -> None:
    many = LEAF_BYTES // FORMAT.num_bytes(1) + 100  # checked in two pieces
    with open_store(tmp_path) as store:
        store.put(identity_of(1), span_of(1, num_tokens=many))
        store.flush()
        found = store.get(identity_of(1))
    assert found is not None
    assert is_span(found, 1, num_tokens=many)
    loaded = safetensors.torch.load_file(path_of(tmp_path, 1))
    assert list(loaded) == [name for name, _ in FORMAT.shapes(many)]
    for one, other in zip(loaded.values(), found.tensors(), strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, other)


def test_host_memory_is_used_again_and_neighbours_are_one_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_memory, "CHUNK_BYTES", 4)
    monkeypatch.setattr(host_memory, "SLAB_BYTES", 16)
    memory = HostMemory(28, is_pinned=False)
    first, second = memory.take(6), memory.take(8)
    assert [len(run) for run in first.runs] == [6]
    assert first.numbers + second.numbers == (0, 1, 2, 3)
    third = memory.take(5)
    memory.give_back(first, ())
    memory.give_back(third, ())
    parts = memory.take(15)  # on both sides of the second
    assert parts.numbers == (0, 1, 4, 5)
    assert [len(run) for run in parts.runs] == [8, 7]
    memory.give_back(second, ())
    assert memory.take(9).numbers == (2, 3, 6)
    assert memory.num_bytes == 28
    memory.take(1)
    assert memory.num_bytes == 32


def test_parts_of_larger_tensors_do_not_keep_these_in_memory() -> None:
    large = [torch.zeros(*shape[:2], 50, shape[3]).bfloat16() for _, shape in FORMAT.shapes(1)]
    parts = SpanValues.of_tensors([tensor[:, :, :3] for tensor in large], 0)
    whole = span_of(5)
    with open_store(None, device_bytes=10**6) as store:
        store.put(identity_of(0), parts)
        store.put(identity_of(1), whole)
        kept, same = store.get(identity_of(0)), store.get(identity_of(1))
    assert kept is not None
    assert same is not None
    assert [it.untyped_storage().nbytes() for it in kept.tensors()] == [
        it.nbytes for it in parts.tensors()
    ]
    assert same.groups[0].keys.data_ptr() == whole.groups[0].keys.data_ptr()


def test_values_of_another_shape_dtype_or_device_are_refused() -> None:
    right = span_of(0)
    wrong = [tensor.float() for tensor in right.tensors()]
    with open_store(None, device_bytes=10**6) as store:
        with pytest.raises(ValueError, match=r"must be \(3, 2, 1, 8\) torch.bfloat16 on cpu, "):
            store.put(identity_of(0), SpanValues.of_tensors(wrong, 0))
        with pytest.raises(ValueError, match="must have 32 bytes, got 3"):
            store.get(b"abc")
        assert not store.contains(identity_of(0))


@pytest.fixture
def written(tmp_path: Path) -> bytearray:
    """A folder with span 1; returns its file's content."""
    with open_store(tmp_path) as store:
        store.put(identity_of(1), span_of(1))
    return bytearray(path_of(tmp_path, 1).read_bytes())


def damaged_contents(content: bytearray) -> list[bytes]:
    generator = random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    found: list[bytes] = []
    for offset in [*range(0, header, 3), *range(header, len(content), 40)]:
        changed = bytearray(content)
        changed[offset] ^= 1 << generator.randrange(8)
        found.append(bytes(changed))
    for length in [*range(0, len(content), 97), header - 1, header, len(content) - 1]:
        found.append(bytes(content[:length]))  # noqa: PERF401
    for damage in DAMAGES:
        for _ in range(10):
            damage(changed := bytearray(content), generator)
            found.append(bytes(changed))
    return [it for it in found if it != content]


def test_spans_asked_for_together_come_from_all_tiers_and_a_damaged_one_is_left_out(
    tmp_path: Path,
) -> None:
    with open_store(tmp_path) as store:
        for number in range(12):
            store.put(identity_of(number), span_of(number))
    path_of(tmp_path, 3).unlink()
    path_of(tmp_path, 7).write_bytes(path_of(tmp_path, 8).read_bytes())
    with open_store(tmp_path, device_bytes=10**6) as store:
        assert store.get(identity_of(5)) is not None
        with pytest.warns(FlexMaskWarning, match="it is of another span"):
            found = store.get_all([identity_of(number % 12) for number in range(24)])
        assert set(found) == {identity_of(number) for number in range(12) if number not in (3, 7)}
        assert all(is_span(found[identity_of(n)], n) for n in range(12) if n not in (3, 7))
        counters = store.counters
        assert (counters.device.hits, counters.device.misses) == (1, 12)
        assert (counters.folder.hits, counters.folder.misses) == (10, 2)
        again = store.get_all(found)
        assert all(again[identity] is found[identity] for identity in found)


def test_every_damaged_file_is_a_miss_and_is_removed(
    tmp_path: Path, written: bytearray, record_property: Callable[[str, object], None]
) -> None:
    path = path_of(tmp_path, 1)
    contents = damaged_contents(written)
    with open_store(tmp_path) as store:
        for number, content in enumerate(contents):
            path.write_bytes(content)
            if number:
                assert store.get(identity_of(1)) is None
            else:
                with pytest.warns(FlexMaskWarning, match=f"{path}: damaged, and removed: "):
                    assert store.get(identity_of(1)) is None
            assert not path.exists()
        assert store.counters.folder.damaged == store.counters.folder.misses == len(contents)
        path.write_bytes(written)
        found = store.get(identity_of(1))
        assert found is not None
        assert is_span(found, 1)
    record_property("cases", len(contents))
    assert len(contents) > 300


def test_a_file_of_another_span_or_another_model_is_a_miss(
    tmp_path: Path, written: bytearray
) -> None:
    (tmp_path / place_of(identity_of(2))[0]).mkdir()
    path_of(tmp_path, 2).write_bytes(written)
    other = replace(FORMAT, model_files={"commit": "4567def"})
    with KVStore(
        other, device=CPU, device_bytes=0, folder=tmp_path / "other", folder_bytes=10**6
    ) as store:
        store.put(identity_of(3), span_of(3))
    (tmp_path / place_of(identity_of(3))[0]).mkdir()
    path_of(tmp_path / "other", 3).rename(path_of(tmp_path, 3))
    with open_store(tmp_path) as store:
        with pytest.warns(FlexMaskWarning, match="it is of another span"):
            assert store.get(identity_of(2)) is None
        assert store.get(identity_of(3)) is None
        assert store.counters.folder.damaged == 2


def test_two_processes_share_a_folder(shared: Shared) -> None:
    found = report(shared.folder / "share", is_verified=True)
    assert (found.bad_files, found.foreign) == ((), ())
    assert found.temporary == 0
    assert found.spans > 5
    assert found.num_bytes < 2 * 30_000


def test_killed_writers_leave_nothing_wrong(shared: Shared) -> None:
    found = report(shared.folder / "kill", is_verified=True)
    assert (found.bad_files, found.foreign) == ((), ())
    assert found.spans > 0
    assert found.temporary >= 3
    with open_store(shared.folder / "kill") as store:
        spans = [number for number in range(40) if store.contains(identity_of(number))]
        for number in spans:
            values = store.get(identity_of(number))
            assert values is not None
            assert is_span(values, number, LARGE_TOKENS)
    assert len(spans) == found.spans


def test_leftovers_of_killed_writers_are_removed_once_they_are_old(tmp_path: Path) -> None:
    old, young = (tmp_path / f".{DESCRIPTION}.{digit * 16}.tmp" for digit in "ab")
    for path in (old, young):
        path.write_text("{")
    with open_store(tmp_path) as store:
        store.put(identity_of(0), span_of(0))
        store.flush()
        folder = path_of(tmp_path, 0).parent
        old_span, young_span = (
            folder / f".{identity_of(0).hex()}.safetensors.{digit * 16}.tmp" for digit in "ab"
        )
        for path in (old_span, young_span):
            path.write_bytes(bytes(1000))
    for path in (old, old_span):
        long_ago = path.stat().st_mtime - LEFTOVER_AGE_S - 60
        os.utime(path, (long_ago, long_ago))
    assert report(tmp_path).temporary == 4
    # A process that needs their room removes them as well, and counts the young ones.
    with open_store(tmp_path, folder_bytes=file_bytes(1) + 1001) as store:
        store.put(identity_of(1), span_of(1))
    assert not old.exists()
    assert not old_span.exists()
    assert young.exists()
    assert young_span.exists()
    assert path_of(tmp_path, 1).exists()
    assert not path_of(tmp_path, 0).exists()


def test_a_full_disk_is_told_once_and_the_run_goes_on(shared: Shared) -> None:
    folder = shared.folder / "fill"
    (line,) = shared.printed.splitlines()
    assert line == (
        f"{folder}: keys and values cannot be written (File too large); the run goes on "
        "without writing them"
    )
    found = report(folder, is_verified=True)
    assert (found.spans, found.bad_files, found.temporary) == (1, (), 0)


def test_other_errors_of_writing_are_raised_at_the_next_call(tmp_path: Path) -> None:
    def written_under_a_file(name: str) -> KVStore:
        store = open_store(tmp_path / name, device_bytes=10**6)
        path_of(tmp_path / name, 0).parent.write_text("in the way")
        store.put(identity_of(0), span_of(0))
        store._writer.flush()
        return store

    expected = "first: keys and values cannot be written [(]Not a directory[)]"
    first = written_under_a_file("first")
    with pytest.raises(KVStoreError, match=expected):
        first.get(identity_of(0))
    assert first.get(identity_of(0)) is not None
    first.close()
    second = written_under_a_file("second")
    with pytest.raises(KVStoreError, match=expected.replace("first", "second")):
        second.close()
    with (
        pytest.raises(KeyboardInterrupt),
        pytest.warns(FlexMaskWarning, match="Not a directory"),
        written_under_a_file("third"),
    ):
        raise KeyboardInterrupt


def test_a_folder_of_another_model_is_refused_with_the_differences(
    tmp_path: Path, written: bytearray
) -> None:
    group = LayerGroup((0, 1, 2), 2, 8, 4)
    other = KVFormat("m", {"commit": "4567def"}, "float32", (group, FORMAT.layer_groups[1]), {})
    with pytest.raises(KVStoreError) as error:
        SpanFolder(tmp_path, other, 10**6)
    assert str(error.value) == (
        f"{tmp_path}: has keys and values of another model or format (model_files.commit: "
        "'0123abc' → '4567def'; dtype: 'bfloat16' → 'float32'; layer_groups.0.layers: '0-1,3' → "
        "'0-2'; rotary.rope_theta: 10000.0 → not set); name another folder"
    )
    renamed = replace(FORMAT, model="elsewhere")
    SpanFolder(tmp_path, renamed, 10**6).close()
    assert report(tmp_path).kv_format == FORMAT


def test_what_is_no_folder_of_spans_is_refused(tmp_path: Path) -> None:
    description = tmp_path / DESCRIPTION
    (tmp_path / "thesis.tex").write_text("x")
    refused = r"has files but no kv-cache\.json"
    with pytest.raises(KVStoreError, match=refused):
        open_store(tmp_path)
    with pytest.raises(KVStoreError, match=r"it has no kv-cache\.json"):
        report(tmp_path)
    with pytest.raises(KVStoreError, match="Not a directory"):
        open_store(tmp_path / "thesis.tex" / "below")
    for content in ("", "[]", "{}", '{"flexmask_kv_format": 1}', "[" * 10**5):
        description.write_text(content)
        with pytest.raises(KVStoreError, match=r"kv-cache\.json: not a description of keys"):
            open_store(tmp_path)
    description.write_text('{"flexmask_kv_format": 2}')
    with pytest.raises(KVStoreError, match="in version 2 of the format, this flexmask writes ver"):
        open_store(tmp_path)
    description.unlink()
    os.mkfifo(description)
    with pytest.raises(KVStoreError, match=refused):
        open_store(tmp_path)


def test_the_description_has_what_spans_have_in_common(tmp_path: Path) -> None:
    open_store(tmp_path / "new" / "folder").close()
    record = json.loads((tmp_path / "new" / "folder" / DESCRIPTION).read_text())
    assert record.pop("flexmask_kv_format") == 1
    assert KVFormat.from_record(record) == FORMAT


def test_links_pipes_and_foreign_files_are_left_alone(tmp_path: Path, written: bytearray) -> None:
    folder = tmp_path / "spans"
    elsewhere = tmp_path / "elsewhere"
    path_of(tmp_path, 1).rename(elsewhere)
    open_store(folder).close()
    linked, piped, below = (path_of(folder, number) for number in (1, 2, 3))
    for path in (linked, piped):
        path.parent.mkdir()
    linked.symlink_to(elsewhere)
    os.mkfifo(piped)
    outside = tmp_path / "outside"
    outside.mkdir()
    below.parent.symlink_to(outside)
    (folder / "notes.txt").write_text("mine")
    with open_store(folder, folder_bytes=file_bytes(1)) as store:
        for number in (1, 2):
            assert not store.contains(identity_of(number))
            assert store.get(identity_of(number)) is None
            store.put(identity_of(number), span_of(number))
        assert store.get(identity_of(3)) is None
        store.flush()
    found = report(folder, is_verified=True, max_bytes=0)
    assert sorted(found.foreign) == sorted(
        str(path.relative_to(folder))
        for path in (linked, piped, below.parent, folder / "notes.txt")
    )
    assert linked.is_symlink()
    assert piped.is_fifo()
    assert list(outside.iterdir()) == []
    assert elsewhere.read_bytes() == written
    assert (folder / "notes.txt").exists()


def test_spans_are_pruned_while_they_are_read(tmp_path: Path) -> None:
    is_over = threading.Event()
    pruned = 0

    def prune_all() -> None:
        nonlocal pruned
        while not is_over.is_set():
            pruned += prune(tmp_path, scan(tmp_path), 3000).spans

    with open_store(tmp_path) as store:
        thread = threading.Thread(target=prune_all)
        thread.start()
        try:
            hits = use(store, random.Random(0), times=400, numbers=20)
        finally:
            is_over.set()
            thread.join()
        counters = store.counters.folder
    assert 0 < hits < 400
    assert pruned > 0
    assert (counters.damaged, counters.unreadable, counters.not_written) == (0, 0, 0)


def test_several_threads_use_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "has_host_tier", lambda device: True)
    monkeypatch.setattr(host_memory, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(host_memory, "SLAB_BYTES", 4 * CHUNK_BYTES)
    hits: list[int] = []

    def use_and_count(seed: int) -> None:
        hits.append(use(store, random.Random(seed), times=150, numbers=20))

    with KVStore(
        FORMAT, device=CPU, device_bytes=3000, host_bytes=3000, folder=tmp_path, folder_bytes=9000
    ) as store:
        threads = [threading.Thread(target=use_and_count, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counters = store.counters
    assert len(hits) == 4
    assert counters.device.hits + counters.device.misses == 600
    assert counters.host.hits + counters.host.misses == counters.device.misses
    assert counters.folder.hits + counters.folder.misses == counters.host.misses
    assert counters.device.hits + counters.host.hits + counters.folder.hits == sum(hits)


def test_spans_that_wait_to_be_written_are_few_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    write = SpanFolder.write

    def write_later(*arguments: object) -> None:
        gate.wait()
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SpanFolder, "write", write_later)
    monkeypatch.setattr(folder_writer, "MAX_WAITING_BYTES", size_of(0) + size_of(1))
    with open_store(tmp_path) as store:
        try:
            store.put(identity_of(0), span_of(0))
            store.put(identity_of(1), span_of(1))
            third = threading.Thread(target=store.put, args=(identity_of(2), span_of(2)))
            third.start()
            found = store.get(identity_of(1))
            assert found is not None
            assert is_span(found, 1)
            assert not path_of(tmp_path, 1).exists()
            third.join(0.05)
            assert third.is_alive()
        finally:
            gate.set()
        third.join()
        store.flush()
        assert all(path_of(tmp_path, number).exists() for number in range(3))
        assert store.counters.folder.hits == 1
