"""Spans whose keys and values follow from a number. Run as a program, processes share folders."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from flexmask.kv_store.folder_files import place_of
from flexmask.kv_store.kv_format import KVFormat, LayerGroup
from flexmask.kv_store.span_header import SpanHeader, num_leaves
from flexmask.kv_store.span_values import SpanValues
from flexmask.kv_store.store import KVStore

FORMAT = KVFormat(
    model="org/model",
    model_files={"commit": "0123abc"},
    dtype="bfloat16",
    layer_groups=(LayerGroup((0, 1, 3), 2, 8, 4), LayerGroup((2,), 1, 16, 16)),
    rotary={"rope_theta": 10000.0},
)
CPU = torch.device("cpu")


def identity_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=32).digest()


def path_of(folder: Path, number: int) -> Path:
    return folder.joinpath(*place_of(identity_of(number)))


def tokens_of(number: int) -> int:
    return 1 + number * 7 % 11


def span_of(number: int, device: torch.device = CPU, num_tokens: int | None = None) -> SpanValues:
    """The keys and values of span ``number``, with values that no other has."""
    generator = torch.Generator().manual_seed(number)
    shapes = FORMAT.shapes(num_tokens or tokens_of(number))
    tensors = [torch.randn(shape, generator=generator).bfloat16() for _, shape in shapes]
    position = None if number % 3 == 0 else number
    return SpanValues.of_tensors([tensor.to(device) for tensor in tensors], position)


def is_span(found: SpanValues, number: int, num_tokens: int | None = None) -> bool:
    """Return True if these are the keys and values of span ``number``, bit for bit."""
    expected = span_of(number, num_tokens=num_tokens)
    pairs = zip(found.tensors(), expected.tensors(), strict=True)
    return found.first_position == expected.first_position and all(
        torch.equal(one.cpu().view(torch.int16), other.view(torch.int16)) for one, other in pairs
    )


def file_bytes(number: int) -> int:
    num_bytes = FORMAT.num_bytes(tokens_of(number))
    crcs = (0,) * num_leaves(num_bytes)
    values = span_of(number)
    header = SpanHeader(identity_of(number), values.first_position, values.num_tokens, crcs)
    return len(header.to_bytes(FORMAT)) + num_bytes


def open_store(folder: Path | None, folder_bytes: int = 10**9, device_bytes: int = 0) -> KVStore:
    return KVStore(
        FORMAT, device=CPU, device_bytes=device_bytes, folder=folder, folder_bytes=folder_bytes
    )


LARGE_TOKENS = 400
"""Of spans that take a while to write."""


def share(folder: Path) -> None:
    """Two processes write, read and prune one folder."""
    children = [forked(partial(use_randomly, folder, seed)) for seed in range(2)]
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def use(store: KVStore, generator: random.Random, times: int, numbers: int) -> int:
    """Get or put spans; returns how many were found, each as it should be."""
    hits = 0
    for _ in range(times):
        number = generator.randrange(numbers)
        found = store.get(identity_of(number))
        if found is None:
            store.put(identity_of(number), span_of(number))
        else:
            assert is_span(found, number)
            hits += 1
    return hits


def use_randomly(folder: Path, seed: int) -> None:
    with open_store(folder, folder_bytes=30_000) as store:
        hits = use(store, random.Random(seed), times=250, numbers=30)
        store.flush()
        counters = store.counters.folder
        assert counters.damaged == counters.unreadable == counters.not_written == 0
        assert counters.hits == hits > 0


def kill(folder: Path) -> None:
    """Processes that write are killed: ten, and until three were in the middle of a file."""
    generator = random.Random(0)
    kills = 0
    while kills < 10 or len(list(folder.glob("*/.*.tmp"))) < 3:
        kills += 1
        reader, writer = os.pipe()
        child = forked(partial(write_forever, folder, writer))
        os.read(reader, 1)
        time.sleep(generator.random() / 10)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def write_forever(folder: Path, started: int) -> None:
    """Spend most of the time in the middle of writing a file, as on a slow disk."""

    def write_slowly(file: int, parts: list[memoryview]) -> int:
        time.sleep(0.0001)
        return os.write(file, parts[0][:4096])

    os.writev = write_slowly  # type: ignore[assignment]
    spans = [span_of(number, num_tokens=LARGE_TOKENS) for number in range(40)]
    with open_store(folder, folder_bytes=2_000_000) as store:
        os.write(started, b"1")
        generator = random.Random(os.getpid())
        while True:
            number = generator.randrange(len(spans))
            if store.get(identity_of(number)) is None:
                store.put(identity_of(number), spans[number])
                store.flush()


def fill(folder: Path) -> None:
    """The second of four spans meets a full disk."""
    with (
        warnings.catch_warnings(record=True) as caught,
        open_store(folder, device_bytes=10**6) as store,
    ):
        warnings.simplefilter("always")
        store.put(identity_of(0), span_of(0))
        store.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        for number in (1, 2, 3):
            store.put(identity_of(number), span_of(number, num_tokens=LARGE_TOKENS))
            store.flush()
        assert all(store.get(identity_of(number)) is not None for number in range(4))
        assert store.counters.folder.not_written == 3
    print("\n".join(str(warning.message) for warning in caught), flush=True)


def forked(run: Callable[[], None]) -> int:
    child = os.fork()
    if not child:
        try:
            run()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return child


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    for action in (share, kill, fill):
        child = forked(partial(action, Path(sys.argv[1]) / action.__name__))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
