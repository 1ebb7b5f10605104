"""Precomputes a small corpus and generates over it. Run as a program, it is killed meanwhile.

python tests/precompute_folders.py FOLDER KILLS
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flexmask import Engine, KVCacheOptions, Request
from flexmask.kv_store.folder_report import report
from kv_spans import forked
from oracles import make_model, random_words
from small_tokenizers import numbered_words

STRATEGY = "parallel_context"
PREFIX = random_words(1, 20)
DOCUMENTS = tuple(random_words(10 + number, 24 + 3 * number) for number in range(8))
CORPUS = [Request((text,), prefix=PREFIX, uuid=str(n)) for n, text in enumerate(DOCUMENTS)]
QUESTIONS = [
    Request(
        (DOCUMENTS[n % 8], DOCUMENTS[(3 * n + 1) % 8], DOCUMENTS[(5 * n + 2) % 8]),
        prefix=PREFIX,
        suffix=random_words(50 + n, 4),
        uuid=str(n),
    )
    for n in range(6)
]


def open_engine(folder: Path | None, model: str = "llama", weights: str = "1") -> Engine:
    """An engine with a folder of keys and values, or without."""
    options = None if folder is None else KVCacheOptions(folder=folder)
    loaded = make_model(model, "flexmask")
    return Engine(loaded, numbered_words(), kv_cache=options, model_files={"weights": weights})


def tensors_in(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each span, by the name of its file."""
    return {path.name: load_file(path) for path in sorted(folder.glob("*/*.safetensors"))}


def assert_equal_folders(found: Path, wanted: Path) -> None:
    """Two folders have the same spans; batches of another size round otherwise."""
    ours, theirs = tensors_in(found), tensors_in(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensors in theirs.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(ours[name][key], tensor, atol=1e-5, rtol=0)


@contextmanager
def slow_writes() -> Iterator[None]:
    """Write as on a slow disk, so that most of the time a file is not whole."""
    write = os.writev

    def write_slowly(file: int, parts: list[memoryview]) -> int:
        time.sleep(0.001)
        return os.write(file, parts[0][:2048])

    os.writev = write_slowly  # type: ignore[assignment]
    try:
        yield
    finally:
        os.writev = write


def precompute(folder: Path) -> None:
    with open_engine(folder) as engine, slow_writes():
        list(engine.precompute(CORPUS, STRATEGY, batch_size=2))


def use(folder: Path) -> None:
    with open_engine(folder) as engine, slow_writes():
        answers = [one.token_ids for one in engine.generate(QUESTIONS, STRATEGY, batch_size=2)]
    (folder / "answers.json").write_text(json.dumps(answers))


def killed(work: Callable[[Path], None], folder: Path, wanted: Path, kills: int) -> list[int]:
    """Kill work over a folder at random moments, then let it end; returns the spans found."""
    started = time.monotonic()
    assert ended(forked(partial(work, wanted))) == 0
    duration_s = time.monotonic() - started
    generator, spans = random.Random(0), list[int]()
    while len(spans) < kills:
        child = forked(partial(work, folder))
        time.sleep(generator.random() * duration_s)
        os.kill(child, signal.SIGKILL)
        if ended(child) != -signal.SIGKILL:  # it was quicker this time
            continue
        if not (folder / "kv-cache.json").exists():
            spans.append(0)
            continue
        found = report(folder, is_verified=True)
        assert not found.bad_files
        spans.append(found.spans)
        if (folder / "answers.json").exists() or found.spans > len(DOCUMENTS):
            for path in folder.glob("*/*.safetensors"):  # begin again
                if generator.random() < 0.7:
                    path.unlink()
            (folder / "answers.json").unlink(missing_ok=True)
    assert ended(forked(partial(work, folder))) == 0
    return spans


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        for work in (precompute, use):
            mine, wanted = folder / work.__name__, folder / f"{work.__name__}-whole"
            spans = killed(work, mine, wanted, kills)
            assert_equal_folders(mine, wanted)
            print(f"{work.__name__}: {kills} kills, spans found {spans}")
        answers = [folder / name / "answers.json" for name in ("use", "use-whole")]
        assert len({path.read_text() for path in answers}) == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
