"""Rows that come and go: prompts are started in rows that others have left."""

import heapq
from itertools import zip_longest

import pytest
import torch
from transformers import GenerationConfig

from flexmask.device_clock import DeviceClock
from flexmask.engine import Engine
from flexmask.engine.logit_fusion import LogitFusion
from flexmask.engine.prefill_planner import PrefillPlanner
from flexmask.errors import FlexMaskWarning
from flexmask.fusion import Fusion
from flexmask.layout import Layout
from flexmask.sampling import Sampling
from oracles import as_on_gpu, make_model
from oracles import random_text_request as request

STEPS = 12
ENDINGS = [2, *range(5, 211, 9)]
"""One token in nine ends a row, so rows end at different times."""

REQUESTS = [request(seed, 1 + seed % 3, 5 + 2 * seed) for seed in range(11)]
KINDS = {
    "greedy": {},
    "sampled": {"sampling": Sampling(2.0, top_k=50, seed=1)},
    "stop": {"stop": ["19"]},
    "mean": {"fusion": "mean"},
    "weighted_max": {"fusion": Fusion("weighted_max", "confidence"), "sampling": Sampling(2.0)},
    "vote": {"fusion": "vote"},
    "processors": {},
}


@pytest.fixture(scope="module")
def engine(tokenizer):
    model = make_model("llama", "flexmask")
    model.generation_config = GenerationConfig(eos_token_id=ENDINGS, pad_token_id=0)
    return Engine(model, tokenizer)


@pytest.fixture
def kind(request, engine, monkeypatch):
    if request.param == "processors":
        config = GenerationConfig(eos_token_id=ENDINGS, pad_token_id=0, repetition_penalty=1.4)
        monkeypatch.setattr(engine.model, "generation_config", config)
    return KINDS[request.param]


def start(engine, requests=REQUESTS, **options):
    options = {"strategy": "ensemble_isolation", "max_new_tokens": STEPS} | options
    return engine.generate(requests, **{"batch_size": 3} | options)


@pytest.fixture(params=[False, True], ids=["cpu", "gpu"])
def in_order_of(request):
    """Lets a run work in the order of a CPU or of a GPU."""
    return as_on_gpu if request.param else lambda run: run


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_each_generation_is_the_one_that_its_request_gets_alone(engine, kind):
    alone = [next(start(engine, [asked], **kind)) for asked in REQUESTS]
    assert len({len(one.token_ids) for one in alone}) > 3
    for batch_size in (3, 5) if "fusion" in kind else (1, 2, 5):
        for change in (lambda run: run, as_on_gpu):
            run = change(start(engine, batch_size=batch_size, **kind))
            assert list(run) == alone
            assert run.stats.warm_compilations == 0
            assert run.stats.prefills > (batch_size > 1) * len(REQUESTS) / batch_size
            assert (run.stats.cold_groups, run.stats.generations) == (0, len(REQUESTS))
            if "fusion" not in kind:
                assert run.stats.used_row_steps == run.stats.generated_tokens


@pytest.fixture(scope="module")
def alone(engine):
    """Generations of the requests, by a batch of one row."""
    return list(start(engine, batch_size=1))


@pytest.fixture
def prefills(engine, monkeypatch):
    """The rows of each prefill, and the number of decode steps before it."""
    prefill, decode = engine.runner.prefill, engine.runner.decode
    found: list[tuple[int, tuple[int, ...]]] = []
    step = 0

    def noted_prefill(plan):
        found.append((step, plan.rows))
        return prefill(plan)

    def noted_decode(token_ids):
        nonlocal step
        step += 1
        return decode(token_ids)

    monkeypatch.setattr(engine.runner, "prefill", noted_prefill)
    monkeypatch.setattr(engine.runner, "decode", noted_decode)
    return found


def test_masks_of_the_next_prompts_are_found_while_the_device_works(
    engine, alone, prefills, monkeypatch
):
    monkeypatch.setattr(DeviceClock, "has_passed", lambda clock, mark: False)
    foresee = PrefillPlanner.foresee
    foreseen: list[tuple[int, Layout]] = []

    def noted(planner, layouts, max_new_tokens):
        foreseen.extend((len(prefills), layout) for layout in layouts)
        foresee(planner, layouts, max_new_tokens)

    monkeypatch.setattr(PrefillPlanner, "foresee", noted)
    assert list(as_on_gpu(start(engine, batch_size=2))) == alone
    assert foreseen
    assert max(done for done, _ in foreseen) < len(prefills)  # before they are started


def longest_first(generations):
    return sorted(generations, key=lambda one: -one.prompt_tokens)


def steps_of(generations, batch_size):
    """Decode steps if each row that is left is given to the next of them."""
    ends = [0] * batch_size
    for one in generations:
        heapq.heappush(ends, heapq.heappop(ends) + len(one.token_ids))
    return max(ends)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_longest_waiting_prompt_starts_in_each_row_that_is_left(engine, alone, batch_size):
    run = start(engine, batch_size=batch_size)
    assert list(run) == alone
    assert run.stats.decode_steps == steps_of(longest_first(alone), batch_size)
    assert run.stats.row_steps == run.stats.decode_steps * batch_size
    assert run.stats.used_row_steps == sum(len(one.token_ids) for one in alone)
    assert run.stats.row_utilization == run.stats.used_row_steps / run.stats.row_steps
    seen = ((one.prompt_tokens + step) for one in alone for step in range(len(one.token_ids)))
    assert run.stats.keys_read == sum(seen)
    assert run.stats.computed_tokens == run.stats.prompt_tokens - len(REQUESTS)


def test_a_row_whose_last_possible_token_is_queued_is_free_before_the_token_is_there(
    engine, prefills
):
    lengths = [len(one.token_ids) for one in start(engine, batch_size=5, max_new_tokens=2)]
    prefills.clear()
    run = as_on_gpu(start(engine, batch_size=5, max_new_tokens=2))
    assert [len(one.token_ids) for one in run] == lengths
    first, _ = prefills[0]
    assert [(steps - first, len(rows)) for steps, rows in prefills] == [(0, 5), (2, 5), (4, 1)]
    assert run.stats.decode_steps == 6


def test_prompts_start_once_enough_rows_are_free(engine, alone, prefills, monkeypatch):
    monkeypatch.setattr("flexmask.engine.scheduler.REFILLED_PART", 2)
    assert list(start(engine, batch_size=5)) == alone
    first, *others, last = [len(rows) for _, rows in prefills]
    assert (first, first + sum(others) + last) == (5, len(REQUESTS))
    assert min(others) >= 3


def test_the_prompts_of_a_request_start_together(engine, prefills, monkeypatch):
    load, loaded = LogitFusion.load, []

    def noted_load(self, groups):
        loaded.append(groups)
        load(self, groups)

    monkeypatch.setattr(LogitFusion, "load", noted_load)
    list(start(engine, batch_size=5, fusion="mean"))
    rows = [[row for own, _ in groups for row in own] for groups in loaded]
    assert rows == [list(rows) for _, rows in prefills]
    sizes = [len(own) for groups in loaded for own, _ in groups]
    assert sorted(sizes) == sorted(len(one.segments) for one in REQUESTS)


@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_a_group_may_have_any_rows(fusion):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    weights = [(1.0, 0.5, 2.0), (1.0, 3.0)]
    fuse = LogitFusion(Fusion(f"weighted_{fusion}", "column"), 3, 5, torch.device("cpu"))
    assert torch.equal(fuse(logits).argmax(-1), logits.argmax(-1))  # each row by itself
    fuse.load([((0, 1, 2), weights[0]), ((3, 4), weights[1])])
    together = fuse(logits)
    order = torch.tensor([4, 0, 2, 3, 1])
    fuse.load([((4, 0, 2), weights[0])])
    fuse.load([((3, 1), weights[1])])
    moved = torch.empty_like(logits).index_copy_(0, order, logits)
    assert torch.equal(fuse(moved)[order], together)


@pytest.mark.parametrize(("work", "failing"), [("prefill", 2), ("decode", 4)])
def test_memory_that_runs_out_while_rows_come_and_go_loses_nothing(
    engine, alone, in_order_of, monkeypatch, work, failing
):
    done, calls = getattr(engine.runner, work), []

    def fail_once(*args):
        calls.append(engine.runner.bound.batch_size)
        if len(calls) == failing:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return done(*args)

    monkeypatch.setattr(engine.runner, work, fail_once)
    run = in_order_of(start(engine, batch_size=5))
    with pytest.warns(FlexMaskWarning, match="out of .*memory: 5 rows at a time become 2"):
        found = [one for batch in run.batches() for one in batch]
    assert sorted(found, key=lambda one: REQUESTS.index(one.request)) == alone
    assert calls[failing - 1 : failing + 1] == [5, 2]
    assert run.stats.halvings == 1


def test_a_run_that_is_stopped_gives_what_was_in_flight(engine, alone, prefills, in_order_of):
    run = in_order_of(start(engine, batch_size=5))
    found = []
    for batch in run.batches():
        found += batch
        run.stop()
    assert all(one in alone for one in found)
    assert 5 <= len(found) == sum(len(rows) for _, rows in prefills) < len(REQUESTS)


def test_runs_that_take_turns_give_what_each_gives_alone(engine, alone, in_order_of):
    fused = list(start(engine, fusion="mean", batch_size=5))
    runs = [start(engine, batch_size=5), start(engine, fusion="mean", batch_size=5)]
    rows = list(zip_longest(*map(in_order_of, runs)))
    assert [row[0] for row in rows] == alone
    assert [row[1] for row in rows] == fused


def test_requests_that_fail_to_be_read_take_no_prompt_in_flight_with_them(
    engine, alone, in_order_of, monkeypatch
):
    monkeypatch.setattr("flexmask.engine.engine.LOOKAHEAD_BATCHES", 1)

    def requests():
        yield from REQUESTS[:10]
        raise OSError("the disk is gone")

    run = in_order_of(start(engine, requests(), batch_size=5))
    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for batch in run.batches():
            found += batch
    assert sorted(found, key=lambda one: REQUESTS.index(one.request)) == alone[:10]


def test_lookaheads_follow_each_other(engine, alone, monkeypatch):
    monkeypatch.setattr("flexmask.engine.engine.LOOKAHEAD_BATCHES", 1)
    run = start(engine, batch_size=2)
    assert list(run) == alone
    lookaheads = [alone[first : first + 2] for first in range(0, len(alone), 2)]
    assert run.stats.decode_steps == steps_of(
        [one for each in lookaheads for one in longest_first(each)], 2
    )


def test_a_batch_that_has_to_grow_is_emptied_first(engine, prefills, monkeypatch):
    monkeypatch.setattr("flexmask.engine.engine.LOOKAHEAD_BATCHES", 1)
    monkeypatch.setattr("flexmask.engine.executor.CPU_AUTO_BATCH_SIZE", 2)
    short, long, of_three = REQUESTS[3], REQUESTS[6], REQUESTS[2]
    options = {"fusion": "mean", "batch_size": None}
    alone = list(start(engine, [short, long, of_three], **options | {"batch_size": 3}))
    prefills.clear()
    assert list(start(engine, [short, long, of_three], **options)) == alone
    lengths = [len(one.token_ids) for one in alone]
    assert lengths[0] != lengths[1]
    (first, rows), (second, more_rows) = prefills
    assert (rows, more_rows) == ((0, 1), (0, 1, 2))
    assert second - first == max(lengths[:2])
