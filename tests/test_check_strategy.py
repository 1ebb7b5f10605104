"""`check_strategy`: what is in order passes, and what is found is shown at its smallest."""

import functools
import re
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import pytest
import torch
from torch.nn.attention import flex_attention

import user_masks
from flexmask import Strategy, mask_strategy
from flexmask.block_mask.intervals.legality import mask_name
from flexmask.check import RULES, check_strategy, run_rules
from flexmask.check.cases import CASES, SAME_SHAPE
from flexmask.errors import StrategyError
from flexmask.mask_mods import and_masks, causal, or_masks
from flexmask.plugins.registry import load_registry, make_strategy
from flexmask_strategies.causal import Causal
from plugin_site import BUILT_IN

COMPILED = ["causal", "prefix_segment", "ensemble_isolation"]


@pytest.mark.parametrize("name", COMPILED)
def test_each_built_in_strategy_keeps_every_rule(name):
    outcomes = list(run_rules(make_strategy(name, {})))
    assert [(item.rule, item.status) for item in outcomes] == [(rule, "ok") for rule in RULES]


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in COMPILED])
def test_each_built_in_strategy_keeps_every_rule_that_needs_no_compiler(name):
    small = {"window": 7, "stride": 7, "sinks": 2}
    parameters = [item.name for item in load_registry().strategy(name).parameters()]
    strategy = make_strategy(name, {key: small[key] for key in small if key in parameters})
    before_compiling = [rule.name for rule in RULES].index("attention")
    outcomes = islice(run_rules(strategy), before_compiling)
    assert [item.finding for item in outcomes] == [None] * before_compiling


USER_MASKS = [cls for cls in vars(user_masks).values() if isinstance(cls, type)]


@pytest.mark.parametrize("cls", USER_MASKS, ids=lambda cls: cls.name)
def test_a_mask_as_a_user_writes_it_keeps_every_rule(cls):
    assert check_strategy(cls()) == []


def test_there_are_five_user_masks():
    assert len(USER_MASKS) == 5


def test_cases_cover_one_and_many_segments_no_prefix_tile_edges_and_length():
    lengths = {case.prefix + sum(case.segments) + case.tail for case in CASES}
    assert {127, 128, 129} <= lengths
    assert max(lengths) > 1000
    assert any(case.prefix == 0 for case in CASES)
    assert {1, 5} <= {len(case.segments) for case in CASES}


def test_layouts_of_one_shape_are_of_one_shape_and_different():
    layouts = [Causal().layout(case.request()) for case in SAME_SHAPE]
    assert len({len(layout) for layout in layouts}) == 1
    assert len({layout.segment_ids for layout in layouts}) == len(layouts)
    for case in CASES:
        other = case.rearranged()
        assert (other.prefix, sum(other.segments)) == (case.prefix, sum(case.segments))


@mask_strategy
def sees_one_ahead(batch):
    """Wrong: one token too many."""
    return lambda b, h, q_idx, kv_idx: q_idx + 1 >= kv_idx


@mask_strategy
def sees_kept_segments(batch):
    """Wrong: reduces over the second dimension of a table."""
    kept = batch.table([[0, 1], [1, 2], [2, 0]])
    ids = batch.segment_ids

    def allowed(b, h, q_idx, kv_idx):
        listed = kept[ids[b, q_idx].clamp(0, 2)] == ids[b, kv_idx]
        return (q_idx >= kv_idx) & (listed.any(-1) | (q_idx == kv_idx))

    return allowed


def test_a_mask_that_reduces_over_a_dimension_of_its_table_is_not_pointwise():
    finding = first_finding(sees_kept_segments())
    assert finding.rule == "pointwise"
    assert "calls any(), a reduction, which FlexAttention cannot compile" in finding.message
    assert "must be pointwise" in finding.message


def first_finding(strategy):
    return next(outcome.finding for outcome in run_rules(strategy) if outcome.finding)


def test_a_finding_shows_rule_layout_pair_and_how_to_mend_it():
    finding = first_finding(sees_one_ahead())
    assert (finding.rule, finding.q_idx, finding.kv_idx) == ("causal", 0, 1)
    assert str(finding).splitlines() == [
        "causal: the token at slot 0 sees slot 1, which comes later",
        "  layout: prefix 1, segments 2, tail 1",
        "       P11T",
        "     P #!..",
        "     1 ###.",
        "     1 ####",
        "     T ####",
        "    slots 0–3 down, 0–3 across; # sees, . does not, ! seen, ? unseen: the pair at fault",
        "  mend: wrap the rule as and_masks(causal, rule); where a prompt token is meant to see "
        "later ones, set is_causal = False and keep the tail unseen",
    ]


@mask_strategy
def forgets_after_a_tile(batch):
    """Wrong: from the second tile on, nothing is seen."""
    positions = batch.position_ids
    return and_masks(causal, lambda b, h, q_idx, kv_idx: positions[b, q_idx] < 128)


def test_a_fault_that_shows_late_is_shown_in_a_window_of_the_mask():
    finding = first_finding(forgets_after_a_tile())
    assert finding.layout == "prefix 29, segments 50 + 47, tail 3"
    assert (finding.rule, finding.q_idx, finding.kv_idx) == ("no empty row", 128, None)
    *rows, legend = finding.picture.splitlines()
    assert rows[-1] == " T " + "." * 24 + " <"
    assert legend.startswith("slots 117–128 down, 105–128 across")


@dataclass(frozen=True)
class Contradictory(Causal):
    """Wrong: its oracle forbids what its mask allows."""

    name = "contradictory"

    def allowed(self, layout, q_idx, kv_idx):
        return kv_idx <= q_idx and (q_idx, kv_idx) != (2, 1)


def test_a_mask_that_differs_from_its_oracle_is_found_at_the_pair():
    finding = first_finding(Contradictory())
    assert finding.rule == "oracle"
    assert finding.message == "allowed() forbids slot 2 to see slot 1, the mask allows it"


@dataclass(frozen=True)
class Nondeterministic(Causal):
    """Wrong: every layout is another."""

    name = "nondeterministic"
    calls: ClassVar[int] = 0

    def layout(self, request):
        type(self).calls += 1
        plan = super().layout(request)
        return (
            plan
            if self.calls % 2
            else plan.__class__(
                plan.token_ids, plan.segment_ids, tuple(p + 1 for p in plan.position_ids)
            )
        )


def test_a_layout_that_is_another_each_time_is_found():
    assert first_finding(Nondeterministic()).message == (
        "layout() returns another layout when it is called again"
    )


@dataclass(frozen=True)
class Forgetful(Causal):
    """Wrong: it leaves out a segment."""

    name = "forgetful"

    def layout(self, request):
        return super().layout(type(request)(request.prefix, request.segments[:1], request.tail))


def test_a_layout_that_leaves_tokens_out_is_found():
    finding = first_finding(Forgetful())
    assert finding.message == "the layout leaves out 3 tokens of the request"
    assert finding.layout == "prefix 0, segments 2 + 3, tail 1"


def test_what_breaks_a_basic_rule_is_checked_no_further():
    @dataclass(frozen=True)
    class NoFunction(Causal):
        name = "no_function"

        def mask_mod(self, batch):
            return None

    *_, last = run_rules(NoFunction())
    assert last.status == "skipped"
    assert (
        first_finding(NoFunction()).message == "mask_mod(batch) returns NoneType, not a function"
    )


def test_torch_settings_are_put_back():
    @mask_strategy
    def sloppy(batch):
        torch.set_default_dtype(torch.float64)
        return causal

    finding = first_finding(sloppy())
    assert finding.message == "it sets torch's default dtype to torch.float64"
    assert torch.get_default_dtype() == torch.float32


def test_a_class_that_is_no_strategy_is_refused():
    class Unfrozen(Strategy):
        name = "unfrozen"

        def mask_mod(self, batch):
            return causal

    with pytest.raises(StrategyError, match="must be decorated with @dataclass"):
        check_strategy(Unfrozen())


@mask_strategy
def reads_on_the_host(batch):
    def near(b, h, q_idx, kv_idx):
        return kv_idx > q_idx.item() - 3

    return and_masks(causal, functools.partial(near))


@mask_strategy
def counts(batch):
    def near(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    def far(b, h, q_idx, kv_idx):
        return q_idx - kv_idx

    return flex_attention.and_masks(near, or_masks(causal, far))


def test_a_finding_names_the_authors_own_functions_where_masks_are_put_together():
    (finding,) = check_strategy(reads_on_the_host())
    assert "mask_mod 'reads_on_the_host.<locals>.near' (test_check_strategy.py:" in finding.message
    assert finding.message.endswith("`return kv_idx > q_idx.item() - 3`")
    assert re.search(r"; see test_check_strategy\.py:\d+: `return", finding.message)
    (finding,) = check_strategy(counts())
    names = re.findall(
        r"'counts\.<locals>\.(\w+)' \(test_check_strategy\.py:\d+\)", finding.message
    )
    assert names == ["near", "far"]
    assert "returns torch.int64" in finding.message


def test_a_mask_of_flexmask_alone_is_named_as_it_is():
    assert mask_name(causal).startswith("mask_mod 'causal' (mask_mods.py:")
    combined = and_masks(causal, causal)
    assert mask_name(combined).startswith("mask_mod 'and_masks.<locals>.and_masks' (mask_mods.py:")
