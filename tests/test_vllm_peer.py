"""``benchmarks/vllm_peer.py`` runs on a CPU without vLLM; its floors and tables are right."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import LlamaForCausalLM

import vllm_peer
from flexmask.bench.floors import ModelCost, Rates
from flexmask.layout import TokenizedRequest
from flexmask.plugins.registry import make_strategy
from peer_tasks import Settings, Tasks
from prompt_work import PromptWork
from random_model import DEMO, random_config, random_model
from test_docs import program
from vllm_stand_in import make_site


@pytest.fixture
def vllm_site(tmp_path):
    """Makes a folder with a package ``vllm`` that has a fault, or none."""
    return partial(make_site, tmp_path / "site")


SETTINGS = Settings(
    shape="demo",
    device="cpu",
    parts=("decode", "first_token"),
    cases=("2x64",),
    strategies=("causal",),
    ways=(),
    steps=3,
    repeats=1,
    requests=None,
    questions=1,
    max_new_tokens=1,
    time_limit_s=60,
)


def test_both_engines_are_measured_and_compared(vllm_site, tmp_path, monkeypatch, capsys):
    record = tmp_path / "record.json"
    command = "vllm_peer --shape demo --device cpu --cases 1x256 --strategies causal --steps 3"
    command += " --repeats 2 --questions 1 --ways none --max-new-tokens 4"
    monkeypatch.setattr(
        sys,
        "argv",
        [*command.split(), "--vllm-site", str(vllm_site()), "--record", str(record)],
    )
    vllm_peer.main()
    measured = json.loads(record.read_text())
    assert {name: each["failure"] for name, each in measured["engines"].items()} == {
        "flexmask": None,
        "vllm": None,
    }
    assert measured["engines"]["vllm"]["environment"]["vllm"] == "0.1"
    parts = [(each["part"], each["way"], each["context"]) for each in measured["comparisons"]]
    assert parts == [
        ("decode", "causal", 256),
        ("first_token", "causal", 256),
        ("dataset", "none", None),
    ]
    for each in measured["comparisons"]:
        own, peer = each["flexmask"], each["vllm"]
        for figure in (own, peer):
            assert len(figure["seconds"]) == (1 if each["part"] == "dataset" else 2)
            assert figure["floor_share"] == figure["floor_s"] / figure["median_s"]
        for same in ("way", "floor_s", "least_tokens", "prompt_tokens"):
            assert own[same] == peer[same]
        assert peer["computed_tokens"] == own["least_tokens"] == own["prompt_tokens"]
    printed = capsys.readouterr().out
    assert printed.splitlines()[-2].startswith("flexmask: complete")
    assert printed.count("tokens/s") == 2


@pytest.mark.parametrize(
    ("fault", "limit_s", "reason", "num_done"),
    [
        ("start", 60, "exit status 1: AssertionError: no memory left", 0),
        ("later", 60, "exit status 1: AssertionError: cannot decode", 1),
        ("hang", 2, "ended at its limit of 2 s", 0),
        (None, 60, None, 2),
    ],
)
def test_a_failure_of_vllm_is_reported_with_what_was_done_before(
    vllm_site, tmp_path, fault, limit_s, reason, num_done
):
    settings = replace(SETTINGS, time_limit_s=limit_s)
    tasks = list(Tasks(settings, None).all())
    folder = tmp_path / "run"
    folder.mkdir()
    report = vllm_peer.run_vllm(settings, tasks, folder, sys.executable, vllm_site(fault))
    assert report.failure == reason
    assert len(report.outcomes) == num_done
    assert (report.environment is None) == (fault in ("start", "hang"))


def test_without_vllm_the_report_says_so(tmp_path):
    tasks = list(Tasks(SETTINGS, None).all())
    report = vllm_peer.run_vllm(SETTINGS, tasks, tmp_path, sys.executable, tmp_path)
    assert report.failure == "exit status 1: ModuleNotFoundError: No module named 'vllm'"


def test_vllm_runs_the_prompts_that_flexmask_runs():
    settings = replace(
        SETTINGS, parts=("dataset",), ways=("none", "each", "mean", "prefix_segment"), questions=3
    )
    none, each, mean, segments = Tasks(settings, None).all()
    assert [task.job.times for task in (none, each)] == [2, 2]
    assert mean.vllm_job is segments.vllm_job is None
    assert each.vllm_job is not None
    assert [len(prompts) for prompts in each.vllm_job.runs] == [15, 15]
    firsts = each.vllm_job.prompts[0][::5]
    assert none.vllm_job == replace(none.job, prompts=(firsts,))
    assert mean.work == each.work


def prompts(*texts):
    return [
        TokenizedRequest((), (tuple(map(ord, text[:-1])),), (ord(text[-1]),)) for text in texts
    ]


def test_tokens_that_begin_alike_are_counted_once():
    work = PromptWork.of(make_strategy("causal", {}), prompts("abcd", "abx", "abcd", "by"))
    # a, ab, abc, abcd, abx, b, by
    assert work == PromptWork(rows=4, tokens=7, pairs=1 + 2 + 3 + 4 + 3 + 1 + 2, keys_seen=13)


@pytest.mark.parametrize("name", ["ensemble_isolation", "prefix_segment"])
def test_isolated_segments_share_their_prefix_and_the_tail_sees_each_key_once(name):
    request = TokenizedRequest((1, 2), ((3, 4), (5,)), (6, 7))
    work = PromptWork.of(make_strategy(name, {}), [request, request])
    # 1, 12, 123, 1234, 125, and the tail of each request behind five keys
    assert work == PromptWork(
        rows=2, tokens=9, pairs=1 + 2 + 3 + 4 + 3 + 2 * (6 + 7), keys_seen=14
    )


def test_the_floor_is_reading_or_computing_whichever_takes_longer():
    cost = ModelCost(
        weight_bytes=1000, slot_bytes=10, token_flops=50, logits_flops=20, pair_flops=3,
        last_token_flops=10, last_pair_flops=1,
    )  # fmt: skip
    rates = Rates(bytes_per_s=10, flops_per_s=1)
    work = PromptWork(rows=2, tokens=4, pairs=9, keys_seen=8)
    whole, keys_only = 2 * (50 + 20) + 8 * 3, 2 * 40 + 1 * 2  # the last tokens, all others
    assert work.prefill_s(cost, rates) == whole + keys_only
    twins = replace(work, rows=5)  # five equal prompts, of which one is computed
    assert twins.prefill_s(cost, rates) == 4 * 50 + 5 * 20 + 8 * 3 + 1 * 2
    assert work.prefill_s(cost, replace(rates, flops_per_s=100)) == 1000 / 10
    reads = [(1000 + 10 * keys) / 10 for keys in (4 + 2, 4 + 4)]
    products = [2 * 70 + 3 * pairs for pairs in (8 + 2, 8 + 4)]
    assert work.decode_s(cost, rates, 2) == sum(products)
    assert work.decode_s(cost, replace(rates, flops_per_s=100), 2) == sum(reads)


def test_the_cost_of_a_model_is_that_of_its_matrices():
    cost = ModelCost.of(random_model("demo", "meta", torch.bfloat16))
    hidden, layers, logits = DEMO["hidden_size"], DEMO["num_hidden_layers"], 2048 * 288
    attention = hidden * 64 * (6 + 2 + 2 + 6)
    products = layers * (attention + 3 * hidden * DEMO["intermediate_size"])
    norms = hidden * (2 * layers + 1)
    assert cost == ModelCost(
        weight_bytes=2 * (products + norms + logits),
        slot_bytes=layers * 2 * 2 * 64 * 2,
        token_flops=2 * (products + norms),
        logits_flops=2 * logits,
        pair_flops=4 * layers * 6 * 64,
        last_token_flops=2 * (products // layers + 2 * hidden - hidden * 64 * (2 + 2)),
        last_pair_flops=4 * 6 * 64,
    )
    config = random_config("demo")
    config.tie_word_embeddings = False
    with torch.device("meta"):
        untied = LlamaForCausalLM(config)
    assert ModelCost.of(untied) == replace(
        cost, weight_bytes=2 * cost.weight_bytes, slot_bytes=2 * cost.slot_bytes
    )


def comparison(part, rows, context, way, own_s, vllm_way, vllm_s):
    def figure(of, median_s):
        return {
            "way": of,
            "median_s": median_s,
            "seconds": [median_s, 1.25 * median_s, 0.8 * median_s],
            "floor_share": 0.001 / median_s,
            "least_tokens": 1000,
            "computed_tokens": 2000,
        }

    vllm = figure(vllm_way, vllm_s) if vllm_way else None
    places = {"part": part, "rows": rows, "context": context, "way": way}
    return places | {"flexmask": figure(way, own_s), "vllm": vllm}


def test_the_tables_beside_vllm_are_those_of_the_records(tmp_path, monkeypatch):
    tables = program("performance_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.targets()[tables.README] == {}
    cases = [
        comparison("decode", 8, 1024, "causal", 0.002, "causal", 0.004),
        comparison("first_token", 8, 1024, "causal", 0.1, "causal", 0.05),
        comparison("first_token", 8, 1024, "ensemble_isolation", 0.1, "causal", 0.05),
    ]
    dataset = [
        comparison("dataset", 1000, None, "none", 1.0, "none", 2.0),
        comparison("dataset", 1000, None, "vote", 8.0, None, None),
    ]
    for name, comparisons in (("", cases), ("-dataset", dataset)):
        record = tmp_path / f"vllm-peer-h100{name}.json"
        record.write_text(json.dumps({"comparisons": comparisons}))
    of_page, of_readme = (tables.targets()[target] for target in (tables.PAGE, tables.README))
    assert of_page["vllm cases"]().splitlines()[2:4] == [
        "| decode, 8 × 1,024 | `causal` | 4,000 tokens/s | 3,200 to 5,000 | 50% "
        "| 2,000 tokens/s | 1,600 to 2,500 | 25% | 2.00 |",
        "| first token, 8 × 1,024 | `causal` | 100.0 ms | 80.0 to 125.0 | 1% "
        "| 50.0 ms | 40.0 to 62.5 | 2% | 0.50 |",
    ]
    assert of_page["vllm dataset"]().splitlines()[2:] == [
        "| `none` | 1.00 s | 0% | 1,000 | 2,000 | `none` | 2.00 s | 0% | 2,000 | 2.00 |",
        "| `vote` | 8.00 s | 0% | 1,000 | 2,000 | – | – | – | – | – |",
    ]
    assert of_readme["vllm"]().splitlines() == [
        "| flexmask / vLLM (of the floor) | 8 × 1,024 tokens |",
        "| --- | --- |",
        "| decode, tokens/s | 4,000 (50%) / 2,000 (25%) |",
        "| first token, ms | 100.0 (1%) / 50.0 (2%) |",
        "",
        "| 1,000 questions | `none` | `vote` |",
        "| --- | --- | --- |",
        "| seconds | 1.00 (0%) / 2.00 (0%) | 8.00 (0%) / – |",
    ]
    for target, of_target in tables.targets().items():
        for name in of_target:
            assert f"<!-- {name} -->\n" in target.read_text()
