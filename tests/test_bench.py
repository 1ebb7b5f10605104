"""``flexmask bench``: what it measures is what it says."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flexmask.bench import attention_timing as attention_bench
from flexmask.bench.attention_timing import AttentionBench, Floor, Timing
from flexmask.bench.heads import Heads
from flexmask.device_clock import Spread, time_call
from flexmask.errors import OptionError
from flexmask.layout import TokenizedRequest
from flexmask.mask_mods import causal
from flexmask.plugins.registry import make_strategy
from flexmask.strategy import Strategy
from flexmask_cli.app import main
from oracles import dense_mask

PAGE = (Path(__file__).parents[1] / "docs" / "compare.md").read_text()
CPU = torch.device("cpu")
REQUEST = TokenizedRequest((5,) * 30, ((6,) * 40, (7,) * 50), (8,) * 3)
HEADS = Heads(4, 2, 32)


@pytest.fixture
def flexmask(monkeypatch, capsys):
    """Runs a command in this process; gives what it prints, or its error."""

    def get(*arguments):
        monkeypatch.setattr(sys, "argv", ["flexmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code or capsys.readouterr().out

    return get


def test_every_way_computes_what_dense_attention_does_and_counts_allowed_pairs(flexmask):
    options = ["--prefix", 30, "--segments", "40,50", "--suffix", 3, "--heads", "4:2"]
    options += ["--head-dim", 32, "--device", "cpu", "--json"]
    found = json.loads(flexmask("bench", "-s", "ensemble_isolation", *options))
    strategy = make_strategy("ensemble_isolation", {})
    allowed = dense_mask(strategy, strategy.layout(REQUEST))
    assert found["tokens"] == len(allowed) == 153
    assert found["allowed_pairs"] == int(allowed.sum())
    ways = {way["way"]: way for way in found["ways"]}
    assert list(ways) == ["SDPA, dense mask", "SDPA, causal", "flex_attention", "flexmask"]
    for name, way in ways.items():
        pairs = 153 * 154 // 2 if name == "SDPA, causal" else found["allowed_pairs"]
        assert way["tflops"] == pytest.approx(4 * pairs * 32 * 4 / way["ms"]["median"] / 1e9)
        assert 0 < way["ms"]["low"] <= way["ms"]["median"] <= way["ms"]["high"]
    errors = [way["relative_error"] for way in ways.values()]
    assert errors[1] is None
    assert all(error < 1e-5 for error in (errors[0], *errors[2:]))
    floor = found["floor"]
    flops = 4 * found["allowed_pairs"] * 32 * 4
    assert floor["compute_ms"] == pytest.approx(1e3 * flops / floor["flops_per_s"])
    moved = 4 * 153 * 32 * (4 + 4 + 2 + 2)
    assert floor["read_ms"] == pytest.approx(1e3 * moved / floor["bytes_per_s"])
    assert floor["ms"] == max(floor["compute_ms"], floor["read_ms"])


def test_a_row_of_an_input_is_timed_and_shown_as_a_table(flexmask, tmp_path, monkeypatch):
    timings = [
        Timing("SDPA, dense mask", note="not run: too large"),
        Timing("flexmask", Spread(2.0, 1.5, 2.5), 0.25, 3e-7),
    ]
    monkeypatch.setattr(AttentionBench, "timings", lambda self: iter(timings))
    monkeypatch.setattr(AttentionBench, "floor", lambda self: Floor(1.0, 1.0, 0.5, 4e12, 2e10))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"segments": ["Q: Where?"]}\n{"segments": ["Q: Who is it?", "Q: Who?"]}\n')
    options = ["-i", path, "--row", 2, "--heads", 2, "--head-dim", 16, "--device", "cpu"]
    (command,) = re.findall(r"\$ flexmask (bench .*)", PAGE)
    assert "297 tokens, 17.7% of pairs" in flexmask(*command.split(), "--device", "cpu")
    printed = flexmask("bench", "-s", "causal", *options)
    assert "causal: rows.jsonl, row 2" in printed
    assert "2 query and 2 key heads of 16, float32 on cpu" in printed
    rows = [re.split("  +", line.strip()) for line in printed.splitlines()[-4:]]
    assert rows == [
        ["way", "ms", "quartiles", "TFLOP/s", "of the floor", "relative error", "note"],
        ["SDPA, dense mask", "not run: too large"],
        ["flexmask", "2.000", "1.500 to 2.500", "0.25", "50%", "3e-07"],
        ["floor", "1.000", "operations; measured 4 TFLOP/s, 20 GB/s"],
    ]


@dataclass(frozen=True)
class Cooler(Strategy):
    """Causal with halved scores."""

    name = "cooler"

    def mask_mod(self, batch):
        return causal

    def score_mod(self, batch):
        return lambda score, b, h, q_idx, kv_idx: score * 0.5


def test_a_strategy_that_changes_scores_is_held_against_dense_scores():
    case = AttentionBench(Cooler(), Cooler().layout(REQUEST), HEADS, CPU, torch.float32)
    dense, _, flex, own = case.timings()
    assert dense.ms is None
    assert dense.note == "not run: the strategy changes scores, which SDPA does not"
    assert flex.relative_error is not None
    assert flex.relative_error < 1e-5
    assert own.relative_error is not None
    assert own.relative_error < 1e-5


def test_a_part_of_the_keys_that_is_scaled_is_held_against_dense_scores():
    strategy = make_strategy("adaptive_parallel", {"scale": 0.5})
    case = AttentionBench(strategy, strategy.layout(REQUEST), HEADS, CPU, torch.float32)
    dense, _, flex, own = case.timings()
    assert dense.ms is None
    assert flex.ms is None
    assert "scales a part of the keys" in flex.note
    assert own.relative_error is not None
    assert own.relative_error < 1e-5


def test_a_mask_that_is_too_large_is_not_made_dense(monkeypatch):
    monkeypatch.setitem(attention_bench.LONGEST_DENSE, "cpu", 100)
    strategy = make_strategy("causal", {})
    case = AttentionBench(strategy, strategy.layout(REQUEST), HEADS, CPU, torch.float32)
    timing = next(case.timings())
    assert (timing.ms, timing.relative_error) == (None, None)
    assert timing.note == "not run: a mask of 0.0 GB; dense ones are made up to 100 tokens"
    assert case._wanted is None


def test_the_times_of_a_call_have_a_median_between_its_quartiles():
    calls = []
    spread = time_call(lambda: calls.append(0), CPU, repeats=5)
    assert 0 <= spread.low <= spread.median <= spread.high
    assert len(calls) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "24:7"], "query heads must be a multiple of key heads, got 24:7 of 128"),
        (["--heads", "many"], "--heads must be two numbers as in 24:8, or one, got 'many'"),
        (["--segments", "4,0"], "--segments must be positive numbers as in 40,35,38, got '4,0'"),
        (["--row", "2"], "--row needs an --input or a --task"),
        (["--input", "x.jsonl", "--suffix", "2"], "--suffix is for a request without an input"),
        (["--dtype", "int8"], "dtype must be auto, float32, bfloat16, float16, got 'int8'"),
        (["--strategy", "casual"], "unknown strategy 'casual'"),
    ],
)
def test_a_mistake_is_one_line(flexmask, arguments, message):
    printed = flexmask("bench", *arguments)
    assert message in printed
    assert "\n" not in printed


def test_heads_are_whole_groups():
    with pytest.raises(OptionError, match="got 0:0"):
        Heads(0, 0, 8)
