"""One engine for several runs: in several threads, and alternately in one."""

import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import pytest
import torch

from flexmask.demo import model_path
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine import Engine
from flexmask.errors import FlexMaskWarning, ModelError, RequestError
from flexmask.request import Request
from flexmask.sampling import Sampling
from oracles import as_on_gpu, make_model, random_words
from oracles import random_text_request as request

REQUESTS = [request(seed, 1 + seed % 4, 5 + 3 * seed) for seed in range(7)]
WITH_PREFIX = [dataclasses.replace(one, prefix=random_words(77, 30)) for one in REQUESTS]
KINDS = {
    "isolated": (REQUESTS, {"strategy": "ensemble_isolation", "batch_size": 3}),
    "causal": (REQUESTS[::-1], {"strategy": "causal", "batch_size": 3}),
    "prefix": (WITH_PREFIX, {"strategy": "ensemble_isolation", "batch_size": 3}),
    "fused": (REQUESTS[:3], {"strategy": "causal", "batch_size": 3, "fusion": "mean"}),
    "hot": (REQUESTS, {"strategy": "causal", "batch_size": 3, "sampling": Sampling(2.0, seed=1)}),
}


def start(engine, kind, **more):
    requests, options = KINDS[kind]
    return engine.generate(requests, **{"max_new_tokens": 4} | options | more)


@pytest.fixture(scope="module")
def alone(engine):
    """What each kind of run gives when no other is under way."""
    return {kind: list(start(engine, kind)) for kind in KINDS}


def in_threads(*tasks):
    """Run tasks at the same time; their results, or what they raise."""
    together = threading.Barrier(len(tasks))

    def after_all_are_there(task):
        together.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(after_all_are_there, t) for t in tasks]]


@pytest.mark.parametrize(
    "kinds",
    [("isolated", "isolated"), ("isolated", "causal", "fused"), ("prefix", "hot")],
    ids=str,
)
def test_runs_in_several_threads_give_what_each_gives_alone(engine, alone, kinds):
    tasks = [lambda kind=kind: list(start(engine, kind)) for kind in kinds]
    for _ in range(2):
        assert in_threads(*tasks) == [alone[kind] for kind in kinds]


@pytest.mark.parametrize("change", [lambda run: run, as_on_gpu], ids=["cpu", "gpu"])
def test_runs_iterated_alternately_give_what_each_gives_alone(engine, alone, change):
    kinds = ["isolated", "prefix", "causal", "fused", "hot"]
    runs = [change(start(engine, kind)) for kind in kinds]
    rows = list(zip_longest(*runs))
    for kind, column in zip(kinds, zip(*rows, strict=True), strict=True):
        assert [one for one in column if one is not None] == alone[kind]


def test_what_is_counted_of_a_run_is_its_own(engine):
    lone = start(engine, "prefix")
    list(lone)
    other, run = start(engine, "causal"), start(engine, "prefix")
    for _ in zip_longest(other, run):
        pass
    names = ("generations", "prompt_tokens", "generated_tokens", "compilations", "halvings")
    for name in names:
        assert getattr(run.stats, name) == getattr(lone.stats, name), name
    lookups = [each.stats.mask_hits + each.stats.mask_misses for each in (run, lone)]
    assert lookups[0] >= lookups[1]
    assert other.stats.compilations == 0


def test_several_threads_may_share_one_run(engine, alone):
    run = start(engine, "isolated")
    parts = in_threads(lambda: list(run), lambda: list(run))
    rows = {one.request.uuid: one for one in parts[0] + parts[1]}
    assert len(parts[0] + parts[1]) == len(rows)
    assert [rows[asked.uuid] for asked in REQUESTS] == alone["isolated"]


def test_an_abandoned_run_and_one_whose_reader_fails_stop_no_other(engine, alone):
    abandoned, failing = as_on_gpu(start(engine, "prefix")), as_on_gpu(start(engine, "causal"))
    assert next(abandoned.batches())
    with pytest.raises(ZeroDivisionError):
        for _ in failing:
            raise ZeroDivisionError
    assert list(start(engine, "isolated")) == alone["isolated"]
    del abandoned
    assert in_threads(lambda: list(start(engine, "isolated"))) == [alone["isolated"]]


def test_requests_may_come_from_another_run_of_the_engine(engine, alone):
    def longer(generations):
        for generation in generations:
            yield dataclasses.replace(generation.request, suffix=f"t9 {generation.text} t8")

    options = {"max_new_tokens": 3, "batch_size": 3}
    want = list(engine.generate(longer(alone["isolated"]), "causal", **options))
    chained = longer(as_on_gpu(start(engine, "isolated")))
    assert list(as_on_gpu(engine.generate(chained, "causal", **options))) == want


def test_memory_that_runs_out_in_one_run_leaves_the_other_right(engine, alone, monkeypatch):
    prefill = engine.runner.prefill

    def prefill_with_little_memory(plan):
        if len(plan.rows) > 3:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return prefill(plan)

    monkeypatch.setattr(engine.runner, "prefill", prefill_with_little_memory)
    large = as_on_gpu(start(engine, "isolated", batch_size=6))
    small = as_on_gpu(start(engine, "causal"))
    with pytest.warns(FlexMaskWarning, match="6 rows at a time become 3"):
        rows = list(zip_longest(large, small))
    assert [row[0] for row in rows] == alone["isolated"]
    assert [row[1] for row in rows] == alone["causal"]


def test_what_fails_in_the_turn_of_another_run_fails_in_its_own(engine, alone, monkeypatch):
    run = as_on_gpu(start(engine, "prefix"))
    batches = run.batches()
    assert next(batches)  # the next prompts are in flight

    def fail():
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(run._scheduler._runner, "_read_step", fail)
    assert list(start(engine, "isolated")) == alone["isolated"]
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(batches)


def test_prompts_interrupted_in_the_turn_of_another_run_are_not_mistaken_for_done(
    engine, alone, monkeypatch
):
    run = as_on_gpu(start(engine, "prefix"))
    batches = run.batches()
    assert next(batches)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(run._scheduler._runner, "_read_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(start(engine, "isolated"))
    assert list(start(engine, "isolated")) == alone["isolated"]
    with pytest.raises(ModelError, match="interrupted while it finished prompts of this one"):
        list(batches)


def test_a_request_refused_in_the_turn_of_another_run_is_told_to_its_own(engine, alone):
    refused = []
    bad = Request(("t9 t8",), uuid="bad")
    requests = [*REQUESTS, bad]
    options = {"max_new_tokens": 4, "batch_size": 3}
    run = engine.generate(
        requests, "causal", on_refused=lambda *pair: refused.append(pair), **options
    )
    batches = as_on_gpu(run).batches()
    kept = next(batches) + next(batches)
    runner = run._scheduler._runner
    read_step = runner._read_step

    def read_spoilt_step():
        runner._queued[0].tokens.token_ids.fill_(-1)
        read_step()

    runner._read_step = read_spoilt_step
    assert list(start(engine, "isolated")) == alone["isolated"]
    runner._read_step = read_step
    assert refused == []
    kept += [one for batch in batches for one in batch]
    assert all(isinstance(error, RequestError) for _, error in refused)
    assert bad in [asked for asked, _ in refused]
    assert len(kept) + len(refused) == len(requests)


@pytest.mark.gpu
def test_runs_on_a_gpu_take_turns_too(models, tokenizer):
    engine = Engine(models("llama", "flexmask", "cuda"), tokenizer)
    kinds = ["isolated", "prefix", "causal", "fused", "hot"]
    lone = {kind: list(start(engine, kind)) for kind in kinds}
    tasks = [lambda kind=kind: list(start(engine, kind)) for kind in kinds]
    another = lambda: list(start(Engine(engine.model, tokenizer), "isolated"))  # noqa: E731
    assert in_threads(*tasks, another) == [*lone.values(), lone["isolated"]]
    rows = list(zip_longest(*(start(engine, kind) for kind in kinds)))
    for kind, column in zip(kinds, zip(*rows, strict=True), strict=True):
        assert [one for one in column if one is not None] == lone[kind]


def test_two_engines_work_in_two_threads(engine, alone, tokenizer):
    models = [make_model("llama", "flexmask") for _ in range(2)]  # by torch's one generator
    first, second = (
        lambda model=model: list(start(Engine(model, tokenizer), "isolated")) for model in models
    )
    results = in_threads(first, lambda: list(start(engine, "prefix")), second)
    assert results == [alone["isolated"], alone["prefix"], alone["isolated"]]


@pytest.mark.parametrize(
    "others",
    [{"padding": "max_length"}, {"truncation": True}, {"split_special_tokens": True}],
    ids=lambda options: next(iter(options)),
)
def test_a_tokenizer_that_others_have_set_up_changes_no_tokens(tokenizer, others):
    shared = copy.deepcopy(tokenizer)
    tokenize, apart = (
        RequestTokenizer(each, allow_special_tokens=True) for each in (shared, tokenizer)
    )
    asked = [*REQUESTS, Request(("t4<eos>t5", "t6"), suffix="t7")]
    first = tokenize(asked[0])
    length = 3 if "truncation" in others else 64
    others_see = len(shared("t4 t5 <eos> t6", max_length=length, **others)["input_ids"])
    for one in asked:
        assert tokenize(one) == apart(one)
    assert tokenize(asked[0]) == first
    # And the others keep their settings.
    assert len(shared.backend_tokenizer.encode("t4 t5 <eos> t6").ids) == others_see


def test_engines_may_be_loaded_while_another_runs(engine, alone):
    def load():
        return Engine.from_pretrained(str(model_path()), device="cpu", dtype="bfloat16").model

    first, rows, second = in_threads(load, lambda: list(start(engine, "isolated")), load)
    assert rows == alone["isolated"]
    assert torch.get_default_dtype() == torch.float32
    for name, weight in first.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, second.get_parameter(name))
