"""Tensor parallelism on a CPU: two processes, of which this one is the first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from flexmask.engine import Engine
from flexmask.engine.leading_ranks import LeadingRanks
from flexmask.errors import ModelError, OptionError, RankError
from flexmask.generation import Generation
from flexmask.kv_store.options import KVCacheOptions
from flexmask.request import Request
from flexmask.sampling import Sampling
from flexmask.tensor_parallel.plan import check_plan
from fused_shards import fuse_decoding, load_fused_shard, residuals
from oracles import SHAPE, make_model

VOCABULARY = SHAPE["vocab_size"]
TRACES_NOTHING = {"TORCHDYNAMO_DISABLE": "1"}
"""Variables of a process whose layers run op by op, so that nothing compiles."""

Checkpoint = Callable[[str], str]


def requests() -> list[Request]:
    """Five requests of three segments."""
    return [
        Request(
            prefix=f"t3 t4 t{number + 5}",
            segments=tuple(f"t{5 + number + k} t{9 + k} t11" for k in range(3)),
            suffix=" t7 t8",
            uuid=str(number),
        )
        for number in range(5)
    ]


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Checkpoint:
    """Saved models of 6 query heads and 2 key heads, and a vocabulary of odd size."""

    def saved(architecture: str) -> str:
        folder = tmp_path_factory.getbasetemp() / f"parallel-{architecture}"
        if not folder.exists():
            model = make_model(architecture, "flexmask")
            for name, weight in model.named_parameters():
                if name.endswith("bias"):
                    weight.normal_(std=0.5)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    return saved


@pytest.fixture(scope="module")
def alone_and_parallel(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Callable[[str], tuple[Engine, Engine]]]:
    """An engine of one process and one of two, for each architecture in turn."""
    made: dict[str, tuple[Engine, Engine]] = {}

    def get(architecture: str) -> tuple[Engine, Engine]:
        if architecture not in made:
            close()
            folder = checkpoint(architecture)
            with pytest.MonkeyPatch.context() as patch:
                for name, value in TRACES_NOTHING.items():
                    patch.setenv(name, value)  # for the other process; this one has read it
                parallel = Engine.from_pretrained(folder, device="cpu", tensor_parallel=2)
            made[architecture] = (Engine.from_pretrained(folder, device="cpu"), parallel)
            for engine in made[architecture]:
                engine.tokenizer = tokenizer  # transformers has one of its own for Qwen2
        return made[architecture]

    def close() -> None:
        for engines in made.values():
            for engine in engines:
                engine.close()
        made.clear()

    yield get
    close()


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.usefixtures("without_inductor")
def test_two_ranks_choose_the_tokens_of_one_process_by_the_same_logits(
    alone_and_parallel: Callable[[str], tuple[Engine, Engine]], architecture: str
) -> None:
    def generated(engine: Engine) -> list[Generation]:
        # As many of the most likely tokens as there are tokens: log-probabilities of all.
        run = engine.generate(
            requests(), "ensemble_isolation", max_new_tokens=6, top_logprobs=VOCABULARY
        )
        return list(run)

    def logprobs_of(found: list[Generation]) -> torch.Tensor:
        rows = [
            {each.token_id: each.logprob for each in step}
            for one in found
            for step in one.top_logprobs or ()
        ]
        return torch.tensor([[row[token] for token in range(VOCABULARY)] for row in rows])

    alone, parallel = map(generated, alone_and_parallel(architecture))
    assert [one.token_ids for one in parallel] == [one.token_ids for one in alone]
    torch.testing.assert_close(logprobs_of(parallel), logprobs_of(alone), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("without_inductor")
def test_a_rank_holds_its_columns_and_nothing_of_others(
    alone_and_parallel: Callable[[str], tuple[Engine, Engine]],
) -> None:
    alone, parallel = alone_and_parallel("llama")
    layer: Any = parallel.model.get_submodule("model.layers.0.self_attn.o_proj.linear")
    whole: Any = alone.model.get_submodule("model.layers.0.self_attn.o_proj")
    assert torch.equal(layer.weight, whole.weight[:, :48])
    for weight in parallel.model.parameters():
        assert weight.is_contiguous()
        assert weight.untyped_storage().nbytes() == weight.nbytes


@pytest.mark.usefixtures("without_inductor")
def test_two_ranks_sample_and_fuse_like_one_process(
    alone_and_parallel: Callable[[str], tuple[Engine, Engine]],
) -> None:
    def generated(engine: Engine) -> list[tuple[int, ...]]:
        run = engine.generate(
            requests(), "causal", fusion="mean", max_new_tokens=5, sampling=Sampling(1.0, seed=3)
        )
        return [tuple(one.token_ids) for one in run]

    alone, parallel = map(generated, alone_and_parallel("llama"))
    assert parallel == alone


@pytest.mark.usefixtures("without_inductor")
def test_two_ranks_score_choices_like_one_process(
    alone_and_parallel: Callable[[str], tuple[Engine, Engine]],
) -> None:
    asked = [replace(one, choices=("t9 t10", "t12")) for one in requests()]

    def scored(engine: Engine) -> list[float]:
        run = engine.score(asked, "causal")
        return [
            token for score in run for choice in score.choices for token in choice.token_logprobs
        ]

    alone, parallel = map(scored, alone_and_parallel("llama"))
    assert parallel == pytest.approx(alone, abs=1e-4)


def assert_halved(parallel: Engine, wanted: list[tuple[int, ...]]) -> None:
    """Assert that a run halves its batch of four rows, and gives the tokens that are wanted."""
    run = parallel.generate(requests(), "causal", max_new_tokens=4, batch_size=4)
    with pytest.warns(UserWarning, match="4 rows at a time become 2"):
        found = list(run)
    assert [one.token_ids for one in found] == wanted
    assert run.stats.batch_size == 2


@pytest.mark.usefixtures("without_inductor")
def test_memory_that_runs_out_on_any_rank_halves_the_batch_on_all(
    alone_and_parallel: Callable[[str], tuple[Engine, Engine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, parallel = alone_and_parallel("llama")
    wanted = [one.token_ids for one in alone.generate(requests(), "causal", max_new_tokens=4)]
    answer, prepared = LeadingRanks._answer, list[int]()

    def first_has_too_little(self: LeadingRanks, worker: Any) -> Any:
        kind, *place = found if isinstance(found := answer(self, worker), tuple) else ("", 0)
        if kind == "done" and not prepared:
            prepared.append(1)
            return ("memory", *place)
        return found

    parallel.release()
    monkeypatch.setattr(LeadingRanks, "_answer", first_has_too_little)
    assert_halved(parallel, wanted)


@pytest.mark.usefixtures("without_inductor")
def test_memory_that_runs_out_in_the_middle_of_a_prefill_halves_the_batch_too(
    alone_and_parallel: Callable[[str], tuple[Engine, Engine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, parallel = alone_and_parallel("llama")
    wanted = [one.token_ids for one in alone.generate(requests(), "causal", max_new_tokens=4)]
    all_reduce, calls = dist.all_reduce, list[int]()

    def second_has_too_little(tensor: torch.Tensor) -> None:
        calls.append(len(calls))
        if len(calls) == 2:  # of two: the last layer ends before it sums anything
            raise torch.OutOfMemoryError("no memory")
        all_reduce(tensor)

    parallel.release()
    monkeypatch.setattr(dist, "all_reduce", second_has_too_little)
    assert_halved(parallel, wanted)


@pytest.mark.usefixtures("without_inductor")
def test_what_looks_at_all_heads_is_refused(
    alone_and_parallel: Callable[[str], tuple[Engine, Engine]], checkpoint: Checkpoint
) -> None:
    _, parallel = alone_and_parallel("llama")
    with pytest.raises(OptionError, match="`segment_attention` looks at all heads"):
        parallel.generate(requests(), "causal", segment_attention=True)
    with pytest.raises(OptionError, match="`kv_cache` keeps whole heads"):
        Engine.from_pretrained(
            checkpoint("llama"), kv_cache=KVCacheOptions(0, 1), tensor_parallel=2, device="cpu"
        )


@pytest.mark.usefixtures("without_inductor")
def test_a_rank_that_is_killed_ends_the_run_with_one_line(
    alone_and_parallel: Callable[[str], tuple[Engine, Engine]],
) -> None:
    _, parallel = alone_and_parallel("llama")
    assert isinstance(parallel.ranks, LeadingRanks)
    (worker,) = parallel.ranks._workers
    run = parallel.generate(requests(), "causal", max_new_tokens=50)
    steps = run.steps()
    next(steps)
    worker.handle.process.kill()
    with pytest.raises(RankError, match=r"^rank 1 of 2 was killed by SIGKILL$"):
        for _ in steps:
            pass
    with pytest.raises(RankError, match="was killed"):
        next(iter(parallel.generate(requests(), "causal")))
    parallel.close()
    assert worker.handle.process.returncode == -signal.SIGKILL


def test_two_ranks_choose_the_same_tokens_by_layers_that_are_fused_as_on_a_gpu(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    alone = Engine.from_pretrained(folder, device="cpu")
    with torch.compiler.set_stance(force_backend="eager"):
        wanted = [one.token_ids for one in alone.generate(requests(), "causal", max_new_tokens=5)]
    fuse_decoding(monkeypatch.setattr)
    residuals.clear()
    load = partial(load_fused_shard, model=folder)
    with Engine.of_ranks(load, tokenizer, 2, "cpu") as parallel:
        run = parallel.generate(requests(), "causal", max_new_tokens=5)
        assert [one.token_ids for one in run] == wanted
    assert sum(residuals) == 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_two_gpus_choose_the_tokens_of_one(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, architecture: str
) -> None:
    torch.set_float32_matmul_precision("highest")

    def generated(ranks: int) -> list[tuple[int, ...]]:
        with Engine.from_pretrained(
            checkpoint(architecture), device="cuda", tensor_parallel=ranks
        ) as engine:
            engine.tokenizer = tokenizer
            # A prefill is captured when its size occurs again, and replayed after that.
            runs = [
                engine.generate(requests(), "ensemble_isolation", max_new_tokens=6, batch_size=2)
                for _ in range(3)
            ]
            return [tuple(one.token_ids) for run in runs for one in run]

    assert generated(2) == generated(1)


def test_no_rank_outlives_the_command_that_started_it(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    rows = [{"uuid": one.uuid, "segments": list(one.segments)} for one in requests()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "flexmask_cli", "generate", "--model", checkpoint("llama")]
    command += ["--device", "cpu", "--tensor-parallel", "2", "--max-new-tokens", "200"]
    command += ["--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "o.jsonl")]
    with subprocess.Popen(command, env=os.environ | TRACES_NOTHING, stderr=subprocess.PIPE) as run:
        worker = wait_for(lambda: child_of(run.pid))
        run.kill()
        run.communicate()
    wait_for(lambda: not Path(f"/proc/{worker}/cmdline").exists() or is_zombie(worker))


def wait_for(find: Callable[[], Any], limit_s: float = 60) -> Any:
    """Return what is found, once it is."""
    deadline = time.monotonic() + limit_s
    while not (found := find()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def child_of(parent: int) -> int | None:
    """Return the rank that a process has started and that has begun to run Python."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return next(
        (
            int(child)
            for child in children
            if "rank_process" in Path(f"/proc/{child}/cmdline").read_text()
        ),
        None,
    )


def is_zombie(process: int) -> bool:
    return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()


def test_models_that_cannot_be_divided_are_refused_in_one_line(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        ModelError, match="6 query heads and 2 key heads do not divide among 3 ranks"
    ):
        Engine.from_pretrained(checkpoint("llama"), tensor_parallel=3, device="cpu")
    with pytest.raises(ModelError, match="type 'gpt2', for which transformers has no tensor par"):
        check_plan(GPT2Config(), 2, "'small'")
    with pytest.raises(ModelError, match=r"type 'qwen3_moe', whose tensor parallel plan asks for"):
        check_plan(Qwen3MoeConfig(), 2, "'small'")
    check_plan(LlamaConfig(**SHAPE), 2, "'small'")


def test_gpus_that_are_not_there_are_refused_in_one_line(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(OptionError, match="`tensor_parallel=2` needs 2 GPUs, and torch sees 1"):
        Engine.from_pretrained(checkpoint("llama"), tensor_parallel=2, device="cuda")
    with pytest.raises(OptionError, match=r"pass `device=cuda`, got 'cuda:0'"):
        Engine.from_pretrained(checkpoint("llama"), tensor_parallel=2, device="cuda:0")
