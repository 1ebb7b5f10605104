"""Precomputes small corpora and generates over them. Run as a program, it is killed meanwhile.

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
from typing import Any

import pyarrow.feather
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module

from command import run_command
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
LATER = [Request((random_words(70 + n, 30 + n),), prefix=PREFIX, uuid=str(n)) for n in range(12)]
"""Documents behind the others."""


def rows_in(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def open_engine(
    folder: Path | None, model: str = "llama", weights: str = "1", device: str = "cpu"
) -> Engine:
    """An engine with a folder of keys and values, or without; its batches round, each its way."""
    options = None if folder is None else KVCacheOptions(folder=folder)
    loaded = make_model(model, "flexmask", device)
    loaded.get_input_embeddings().register_forward_hook(_rounded)
    return Engine(loaded, numbered_words(), kv_cache=options, model_files={"weights": weights})


def _rounded(_: Module, tokens: tuple[Tensor], embedded: Tensor) -> Tensor:
    """Change the last digits by all tokens that are computed together.

    On some machines, small matrix products round the same whatever their size.
    """
    return embedded + 1e-9 * (tokens[0].sum() % 13)


def tensors_in(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each span, by the name of its file."""
    return {path.name: load_file(path) for path in sorted(folder.glob("*/*.safetensors"))}


def files_in(folder: Path) -> dict[str, bytes]:
    """The bytes of each file, by its path in a folder, but for those that were never whole."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(folder)): path for path in paths if path.suffix != ".tmp"}
    return {name: path.read_bytes() for name, path in files.items()}


def assert_close_folders(found: Path, wanted: Path, tolerance: float) -> None:
    """Two folders have the same spans, computed in other batches, which round otherwise."""
    ours, theirs = tensors_in(found), tensors_in(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensors in theirs.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(ours[name][key], tensor, atol=tolerance, rtol=0)


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
        list(engine.precompute([*CORPUS, *QUESTIONS, *LATER], STRATEGY, batch_size=3))


def kill_precomputing(folder: Path, kills: int) -> None:
    """Kill runs; after every other one, spans are gone too, as if the folder had been pruned."""
    wanted, mine = folder / "wanted", folder / "mine"
    duration_s = lasting(partial(precompute, wanted))
    files = files_in(wanted)
    generator, spans = random.Random(0), list[int]()
    while len(spans) < kills:
        if is_killed(partial(precompute, mine), generator.random() * duration_s):
            spans.append(len(files_in(mine)) - 1)
            if (mine / "kv-cache.json").exists():
                assert not report(mine, is_verified=True).bad_files
        if len(spans) % 2 or files_in(mine) == files:
            for path in sorted(mine.glob("*/*.safetensors")):
                if generator.random() < 0.3:
                    path.unlink()
    lasting(partial(precompute, mine))
    assert files_in(mine) == files
    print(f"precompute: {kills} kills, spans found {spans} of {len(files) - 1}")


def kill_use(folder: Path, kills: int) -> None:
    """Kill ``flexmask generate`` over a whole corpus, in as many rounds as it takes."""
    kv, output = folder / "kv", folder / "killed.feather"
    texts = [f"Doc {n}: {'the harbour of Fumholm is old and ' * (2 + n)}\n" for n in range(6)]
    corpus = rows_in(folder / "corpus.jsonl", [{"segments": [text]} for text in texts])
    rows = [
        {"segments": [texts[n % 6], texts[(n + 2) % 6]], "suffix": f"Q: Which one is {n}?\nA:"}
        for n in range(6 + 6 * kills)
    ]
    options = ("--strategy", STRATEGY, "--device", "cpu", "--quiet", "--kv-cache", kv)
    lasting(partial(run, "precompute", "--input", corpus, *options))
    files = files_in(kv)
    questions = rows_in(folder / "questions.jsonl", rows)
    generate = partial(
        run, "generate", "--input", questions, *options, "--max-new-tokens", "6",
        "--batch-size", "2", "--resume", "--output",
    )  # fmt: skip
    duration_s = lasting(partial(generate, folder / "whole.feather"))
    whole = pyarrow.feather.read_table(folder / "whole.feather")
    generator, times, rounds = random.Random(0), 0, 1
    while times < kills:
        times += is_killed(partial(generate, output), generator.random() * duration_s)
        assert files_in(kv) == files
        if output.exists():
            assert pyarrow.feather.read_table(output).equals(whole)
            output.unlink()
            rounds += 1
    lasting(partial(generate, output))
    assert pyarrow.feather.read_table(output).equals(whole)
    assert files_in(kv) == files
    print(f"generate: {kills} kills in {rounds} rounds over {len(files) - 1} spans")


def run(*arguments: object) -> None:
    """Run ``flexmask``, which succeeds."""
    outcome = run_command(*arguments)
    assert outcome.status == 0, outcome.err


def lasting(work: Callable[[], None]) -> float:
    """Let work end in a process of its own; returns its seconds."""
    started = time.monotonic()
    assert ended(forked(work)) == 0
    return time.monotonic() - started


def is_killed(work: Callable[[], None], after_s: float) -> bool:
    """Kill work after some time; False if it has ended by then."""
    child = forked(work)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    status = ended(child)
    assert status in (0, -signal.SIGKILL)
    return status != 0


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        for kill in (kill_precomputing, kill_use):
            (folder / kill.__name__).mkdir()
            kill(folder / kill.__name__, kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
