"""Documents that were computed before are found in every prompt, and computed in none."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import precompute_folders
from command import run_command
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.precomputing import SpanComputer
from flexmask.engine.reuse_limits import limit_of_reuse
from flexmask.errors import (
    FlexMaskWarning,
    KVStoreError,
    OptionError,
    RequestError,
    StrategyError,
)
from flexmask.kv_store.span_folder import SpanFolder
from flexmask.plugins.registry import make_strategy
from flexmask.request import Request
from flexmask_cli import progress
from flexmask_cli.render.generation import print_notes
from kv_spans import open_store
from oracles import random_words
from plugin_site import BUILT_IN
from precompute_folders import (
    CORPUS,
    DOCUMENTS,
    PREFIX,
    QUESTIONS,
    assert_close_folders,
    files_in,
    open_engine,
    rows_in,
    tensors_in,
)
from small_tokenizers import SPACED, byte_level

pytestmark = pytest.mark.usefixtures("without_inductor")

LENGTHS = [len(text.split()) for text in DOCUMENTS]
PREFIX_TOKENS = 1 + len(PREFIX.split())


@pytest.mark.parametrize("strategy", ["parallel_context", "block_attention", "ensemble_isolation"])
def test_prompts_find_all_documents_of_a_corpus_and_compute_their_tails_alone(strategy, tmp_path):
    with open_engine(tmp_path) as engine:
        run = engine.precompute(CORPUS, strategy, batch_size=3)
        assert sorted(one.uuid for one in run) == [one.uuid for one in CORPUS]
        prefix = strategy != "ensemble_isolation"  # where it is a part of each document
        assert (run.stats.cached_spans, run.stats.kept_spans) == (0, len(CORPUS) + prefix)
        assert run.stats.decode_steps == 0
        if strategy == "parallel_context":
            assert run.stats.computed_tokens == PREFIX_TOKENS + sum(LENGTHS)
    with open_engine(tmp_path) as engine:
        found = engine.generate(QUESTIONS, strategy, batch_size=2)
        answers = [one.token_ids for one in found]
        assert found.stats.kept_spans == 0
        assert found.stats.cached_spans >= 3 * len(QUESTIONS)
        tails = sum(len(one.suffix.split()) - 1 for one in QUESTIONS)
        # What all prompts begin with is computed once if it is no span of its own.
        assert found.stats.computed_tokens == tails + (0 if prefix else PREFIX_TOKENS)
    with open_engine(None) as engine:
        alone = engine.generate(QUESTIONS, strategy, batch_size=2)
        assert answers == [one.token_ids for one in alone]


def test_requests_with_several_documents_are_computed_as_generate_needs_them(tmp_path):
    folder, corpus = tmp_path / "folder", tmp_path / "corpus"
    with open_engine(corpus) as engine:
        list(engine.precompute(CORPUS, "parallel_context"))
    with open_engine(folder) as engine:
        run = engine.precompute(QUESTIONS[:2], "parallel_context")
        list(run.batches())
        documents = {text for one in QUESTIONS[:2] for text in one.segments}
        assert run.stats.kept_spans == 1 + len(documents)
        found = engine.generate(QUESTIONS[:2], "parallel_context")
        list(found)
        assert found.stats.kept_spans == 0
    alone = tensors_in(corpus)
    for name, tensors in tensors_in(folder).items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, alone[name][key], atol=1e-5, rtol=0)


def test_what_is_missing_gets_the_bytes_of_an_undisturbed_run_and_what_is_there_keeps_its_own(
    device, tmp_path
):
    open_on = partial(open_engine, device=device)
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    with open_on(whole) as engine:
        list(engine.precompute(CORPUS, "parallel_context", batch_size=2))
    files = files_in(whole)
    with open_on(folder) as engine:  # of other batches
        list(engine.generate(QUESTIONS[:1], "parallel_context"))
    before = files_in(folder)
    with open_on(folder) as engine:
        run = engine.precompute(CORPUS, "parallel_context", batch_size=2)
        list(run)
        assert (run.stats.cached_spans, run.stats.kept_spans) == (4, 5)
    assert files_in(folder).items() >= before.items()
    assert_close_folders(folder, whole, tolerance=1e-5 if device == "cpu" else 1e-3)
    with open_on(whole) as engine:
        run = engine.precompute(CORPUS, "parallel_context", batch_size=2)
        assert list(run) == CORPUS
        assert (run.stats.cached_spans, run.stats.computed_tokens) == (9, 0)
    for name in tensors_in(whole):  # the prefix, too, of which all documents depend
        (gone,) = whole.glob(f"*/{name}")
        gone.unlink()
        with open_on(whole) as engine:
            list(run := engine.precompute(CORPUS, "parallel_context", batch_size=2))
        assert (run.stats.kept_spans, run.stats.prefills) == (1, 1)
        assert files_in(whole) == files


def test_under_causal_equal_beginnings_are_found_and_a_warning_says_so(tmp_path):
    request = replace(QUESTIONS[0], uuid="other", suffix=random_words(9, 5))
    with open_engine(tmp_path) as engine:
        with pytest.warns(FlexMaskWarning, match="depend on the documents before it"):
            list(run := engine.precompute(QUESTIONS[:1], "causal"))
        assert run.stats.kept_spans > 0
        list(found := engine.generate([request], "causal"))
        assert found.stats.computed_tokens == 4


ON_THOSE_BEFORE = "depend on the documents before it"
NOTHING = "no keys and values can be reused"
LIMITED = {
    "causal": ON_THOSE_BEFORE,
    "sliding_window": ON_THOSE_BEFORE,
    "global_window": ON_THOSE_BEFORE,
    "strided": ON_THOSE_BEFORE,
    "few_shot_isolation": ON_THOSE_BEFORE,  # paraphrases depend on the one example before them
    "prefix_lm": NOTHING,
    "dilated": NOTHING,
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_limits_reuse_is_found_on_the_mask(name):
    strategy = make_strategy(name, {})
    if LIMITED.get(name) is NOTHING:
        with pytest.raises(StrategyError, match=NOTHING):
            limit_of_reuse(strategy)
        return
    limit = limit_of_reuse(strategy)
    assert (limit is not None) == (name in LIMITED)
    assert limit is None or LIMITED[name] in limit


@pytest.mark.parametrize(
    ("name", "values", "limit"),
    [
        ("parallel_context", {"n_windows": 16}, None),
        ("parallel_context", {"n_windows": 3}, ON_THOSE_BEFORE),  # several in each window
        ("parallel_context", {"n_windows": 1}, ON_THOSE_BEFORE),
        ("tree", {"parents": "0,1,2"}, ON_THOSE_BEFORE),
        ("global_window", {"window": 16}, "only those of prefixes"),
    ],
)
def test_parameters_of_a_strategy_limit_reuse_too(name, values, limit):
    found = limit_of_reuse(make_strategy(name, values))
    assert found is None if limit is None else limit in str(found)


@pytest.mark.parametrize("make", [*SPACED.values(), byte_level], ids=lambda make: make.__name__)
@pytest.mark.parametrize("prefix", ["", "Answer in one word."])
def test_a_document_alone_has_the_tokens_that_it_has_among_others(make, prefix):
    tokenizer = RequestTokenizer(make())
    text, other = "Ada born in London\n", "Q: birthplace\n"
    among = tokenizer(Request((other, text), prefix=prefix, suffix="A:"))
    for suffix in ("", "A:"):
        alone = tokenizer.document(Request((text,), prefix=prefix, suffix=suffix))
        assert (alone.prefix, alone.segments) == (among.prefix, among.segments[1:])


def test_an_engine_without_a_cache_and_impossible_options_are_refused(tmp_path, engine):
    with pytest.raises(OptionError, match="precompute needs an engine with a kv_cache"):
        engine.precompute(CORPUS, "parallel_context")
    with open_engine(tmp_path) as cached:
        with pytest.raises(OptionError, match="batch_size must be positive, got 0"):
            cached.precompute(CORPUS, "parallel_context", batch_size=0)
        with pytest.raises(StrategyError, match="under strategy 'dilated' no keys"):
            cached.precompute(CORPUS, "dilated")
        long = Request((random_words(3, 400),), uuid="long")
        with pytest.raises(RequestError, match="the model's context is 256"):
            list(cached.precompute([long], "parallel_context"))
        refused: list[str] = []
        run = cached.precompute(
            [long, CORPUS[0]],
            "parallel_context",
            on_refused=lambda request, error: refused.append(request.uuid),
        )
        assert [one.uuid for one in run] == ["0"]
        assert refused == ["long"]


def test_a_full_disk_ends_the_run_with_an_error(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SpanFolder, "write", full)
    with open_engine(tmp_path) as engine:
        run = engine.precompute(CORPUS, "parallel_context", batch_size=1)
        with (
            pytest.warns(FlexMaskWarning, match="No space left on device"),
            pytest.raises(KVStoreError, match="spans were computed and could not be written"),
        ):
            list(run)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.long)])
def test_runs_killed_at_random_moments_leave_what_undisturbed_ones_leave(
    kills: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("cases", 2 * kills)  # while precomputing, and while the folder is used
    command = [sys.executable, precompute_folders.__file__, str(tmp_path), str(kills)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    print(result.stdout)


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A corpus, questions with its documents, and the instruction that all begin with."""
    texts = [
        f"Document {number}: {'the harbour of Fumholm is old and ' * 4}\n" for number in "abc"
    ]
    question = {
        "segments": texts,
        "suffix": "Q: Which harbour is old?\nA:",
        "answers": ["Fumholm"],
    }
    prefix = tmp_path / "prefix.txt"
    prefix.write_text("Read all of the documents that follow and answer with one word.\n")
    return (
        rows_in(tmp_path / "docs.jsonl", [{"text": text} for text in texts]),
        rows_in(tmp_path / "questions.jsonl", [question]),
        prefix,
    )


OPTIONS = ("--device", "cpu", "--strategy", "parallel_context", "--batch-size", "2")


def test_the_command_fills_a_folder_that_generate_takes_all_documents_from(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    corpus, questions, prefix = inputs
    kept = (*OPTIONS, "--kv-cache", tmp_path / "kv", "--prefix-file", prefix)
    command = ("precompute", "--input", corpus, "--column", "segments=text", *kept)
    first = run_command(*command, "--limit", "2")
    assert first.status == 0, first.err
    lines = first.out.splitlines()
    assert lines[:2] == ["rows: 2", "spans of prefixes and documents: 0 found, 3 computed"]
    assert lines[-1].endswith(f" KiB written to {tmp_path / 'kv'}")
    assert "2 of 2 rows, " in first.err
    second = run_command(*command, "--json", "--verbose")
    assert "keys and values of spans: reused at any position" in second.err
    figures = json.loads(second.out)
    assert (figures["rows"], figures["spans_found"], figures["spans_computed"]) == (3, 3, 1)
    listed = json.loads(run_command("kv-cache", tmp_path / "kv", "--json").out)
    assert (listed["spans"], listed["bad_files"]) == (4, [])
    output = ("--output", tmp_path / "out.feather", "--max-new-tokens", "2", "--json")
    found = run_command("generate", "--input", questions, *kept, *output)
    assert found.status == 0, found.err
    run = json.loads(found.out)["run"]
    assert (run["cached_spans"], run["kept_spans"]) == (4, 0)
    quiet = run_command(*command, "--quiet")
    assert (quiet.status, quiet.out, quiet.err) == (0, "", "")


def test_rows_that_cannot_be_used_are_told(inputs, tmp_path):
    bad = rows_in(tmp_path / "bad.jsonl", [{"text": " "}, {"text": "a word"}])
    kept = (*OPTIONS, "--kv-cache", tmp_path / "kv")
    command = ("precompute", "--input", bad, "--column", "segments=text", *kept)
    assert "bad.jsonl:1: segment 1 is empty" in run_command(*command).error
    skipped = run_command(*command, "--on-error", "skip", "--quiet")
    assert skipped.status == 0
    assert skipped.err.startswith("warning: ")
    assert "bad.jsonl:1: segment 1 is empty" in skipped.err


def test_mistakes_are_told_in_one_line(inputs, tmp_path):
    corpus, *_ = inputs
    command = ("precompute", "--input", corpus, "--column", "segments=text", *OPTIONS)
    assert "precompute needs a folder to write to" in run_command(*command).error
    open_store(tmp_path / "other").close()
    error = run_command(*command, "--kv-cache", tmp_path / "other").error
    assert "model_files" in error
    dilated = (*command, "--strategy", "dilated", "--kv-cache", tmp_path / "kv")
    assert NOTHING in run_command(*dilated).error


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ("600KiB", "left the folder to make room; raise --kv-cache-folder-size"),
        ("200KiB", "3 spans are larger than --kv-cache-folder-size, and not kept"),
    ],
)
def test_what_a_small_folder_does_not_keep_is_told(size, told, inputs, tmp_path):
    corpus, *_ = inputs
    command = ("precompute", "--input", corpus, "--column", "segments=text", *OPTIONS, "--quiet")
    found = run_command(*command, "--kv-cache", tmp_path / "kv", "--kv-cache-folder-size", size)
    assert found.status == 0
    assert told in found.err


def test_ctrl_c_ends_the_command_after_a_batch_and_what_is_computed_stays(
    inputs, tmp_path, monkeypatch
):
    corpus, *_ = inputs
    batch = SpanComputer._batch

    def interrupted(self: SpanComputer, *arguments: Any) -> list[None]:
        signal.raise_signal(signal.SIGINT)
        return batch(self, *arguments)

    one_by_one = (*OPTIONS, "--batch-size", "1", "--quiet", "--kv-cache", tmp_path / "kv")
    command = ("precompute", "--input", corpus, "--column", "segments=text", *one_by_one)
    with monkeypatch.context() as patch:
        patch.setattr(SpanComputer, "_batch", interrupted)
        stopped = run_command(*command)
    assert stopped.status != 0
    assert "interrupted; what is computed is kept, the same command does the rest" in stopped.err
    assert len(tensors_in(tmp_path / "kv")) == 1
    assert run_command(*command).status == 0
    assert len(tensors_in(tmp_path / "kv")) == 3


def test_verbose_notes_say_why_keys_cannot_be_turned(capsys):
    runner = SimpleNamespace(
        layer_windows={"full": None}, store=object(), fixed_position_reason="X masks by itself"
    )
    model: Any = torch.nn.Module()
    model.dtype, model.device = torch.float32, torch.device("cpu")
    fake: Any = SimpleNamespace(model=model, runner=runner)
    print_notes(fake, make_strategy("causal", {}), "attention")
    assert capsys.readouterr().err.splitlines()[-1] == (
        "keys and values of spans: reused at the position of their first use only: "
        "X masks by itself"
    )
