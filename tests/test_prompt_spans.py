"""Spans are what the mask proves: checked pair by pair against the plain-Python oracles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from flexmask.block_mask.equality import rows_are_causal, spans_see
from flexmask.block_mask.regions import Regions, region_values
from flexmask.engine.prompt_spans import SpanFinder, span_identity
from flexmask.engine.span_sharing import COPIED, PromptSpans, divide
from flexmask.errors import MaskError
from flexmask.layout import Layout, TokenizedRequest
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import causal
from flexmask.plugins.registry import load_registry, make_strategy
from flexmask_strategies.adaptive_parallel import AdaptiveParallel
from flexmask_strategies.causal import Causal
from flexmask_strategies.ensemble_isolation import EnsembleIsolation
from flexmask_strategies.prefix_segment import PrefixSegment
from mask_grammar import random_masks
from oracles import dense_mask, random_request

NAMES = sorted(one.cls.name for one in load_registry().strategies())
SIZE = 41


def spans_of(strategy, layout):
    return SpanFinder(strategy).spans_of([layout])[0]


def known(strategy, layouts):
    """Prompts with their spans and identities, as the planner has them."""
    prompts = []
    for row, spans in enumerate(SpanFinder(strategy).spans_of(layouts)):
        identities: dict[int, bytes] = {}
        for index in range(len(spans)):
            identities[index] = span_identity(layouts[row], spans, index, identities)
        count = len(layouts[row]) - 1
        prompts.append(PromptSpans(row, layouts[row], count, spans, tuple(identities.values())))
    return prompts


def identities_of(strategy, request):
    return list(known(strategy, [strategy.layout(request)])[0].identities)


@pytest.mark.parametrize("name", NAMES)
def test_spans_see_themselves_and_their_ancestors_and_nothing_else(name):
    strategy = make_strategy(name, {})
    layout = strategy.layout(random_request(3, 9, [14, 11, 23], 6))
    allowed = dense_mask(strategy, layout)[:-1, :-1]
    spans = spans_of(strategy, layout)
    for span in spans:
        expected = torch.zeros_like(allowed[span.start : span.stop])
        for ancestor in span.ancestors:
            expected[:, spans[ancestor].start : spans[ancestor].stop] = True
        size = span.stop - span.start
        expected[:, span.start : span.stop] = torch.ones(size, size, dtype=torch.bool).tril()
        assert torch.equal(allowed[span.start : span.stop], expected)
    assert spans or name in {"dilated", "prefix_lm"}


def test_every_part_is_a_span_where_segments_are_isolated():
    request = random_request(3, 9, [14, 11], 6)
    found = spans_of(PrefixSegment(), PrefixSegment().layout(request))
    assert [(one.start, one.stop, one.ancestors) for one in found] == [
        (0, 9, ()), (9, 23, (0,)), (23, 34, (0,)), (34, 39, (0, 1, 2)),
    ]  # fmt: skip
    found = spans_of(EnsembleIsolation(), EnsembleIsolation().layout(request))
    assert [one.ancestors for one in found] == [(), (), (0, 1)]


@dataclasses.dataclass(frozen=True)
class Leaking(PrefixSegment):
    """Allows one more pair."""

    query: int = 0
    key: int = 0

    def mask_mod(self, batch):
        own, query, key = super().mask_mod(batch), self.query, self.key

        def leaks(b, h, q_idx, kv_idx):
            return own(b, h, q_idx, kv_idx) | ((q_idx == query) & (kv_idx == key))

        return leaks


@pytest.mark.parametrize(("query", "key"), [(30, 10), (33, 22), (12, 40)])
def test_a_segment_that_leaks_one_pair_is_no_span(query, key):
    layout = PrefixSegment().layout(random_request(3, 9, [14, 11, 20], 6))
    whole = spans_of(PrefixSegment(), layout)
    found = spans_of(Leaking(query=query, key=key), layout)
    changed = next(one for one in whole if one.start <= query < one.stop)
    slots = [(one.start, one.stop) for one in found]
    assert (changed.start, changed.stop) not in slots
    others = [(one.start, one.stop) for one in whole[:-1] if one is not changed]
    assert set(others) <= set(slots)


def test_tokens_whose_scores_change_are_in_no_span():
    layout = AdaptiveParallel().layout(random_request(3, 9, [14, 11], 6))
    assert [one.stop for one in spans_of(AdaptiveParallel(), layout)] == [9, 23, 34]

    @dataclasses.dataclass(frozen=True)
    class Everywhere(AdaptiveParallel):
        def scored_queries(self, batch):
            return None

    assert spans_of(Everywhere(), layout) == ()


def test_a_score_mod_is_applied_to_the_queries_that_it_names_only():
    class TooMuch(AdaptiveParallel):
        def score_mod(self, batch):
            return lambda score, b, h, q_idx, kv_idx: score + 1

        def scored_queries(self, batch):
            return lambda b, q_idx: q_idx > 3

    score_mod = TooMuch().applied_score_mod(LayoutBatch(1, 8, torch.device("cpu")))
    assert score_mod is not None
    indices = [torch.tensor(0), torch.tensor(0), torch.arange(6), torch.tensor(2)]
    changed = score_mod(torch.zeros(6), *indices)
    assert changed.tolist() == [0, 0, 0, 0, 1, 1]


def test_an_identity_depends_on_all_that_keys_and_values_depend_on():
    request = random_request(3, 9, [14, 11], 6)
    strategy = PrefixSegment()
    own = identities_of(strategy, request)
    assert len(set(own)) == 4
    assert identities_of(strategy, request) == own
    reordered = dataclasses.replace(request, segments=request.segments[::-1])
    again = identities_of(strategy, reordered)
    assert again[1:3] == own[2:0:-1]  # wherever a segment stands
    assert again[3] != own[3]  # the tail sees them in another order
    shorter = dataclasses.replace(request, prefix=request.prefix[:-1])
    assert not set(identities_of(strategy, shorter)) & set(own)
    moved = identities_of(PrefixSegment(positions="sequential"), request)
    assert moved[:2] == own[:2]
    assert moved[2] != own[2]  # another distance from the prefix


def test_an_identity_depends_on_the_position_only_where_keys_cannot_be_turned():
    def identities(start, **options):
        positions = tuple(range(start, start + 9))
        layout = Layout(tuple(range(10, 19)), (1,) * 8 + (-1,), positions)
        spans = spans_of(Causal(), layout)
        return span_identity(layout, spans, 0, {}, **options)

    assert identities(0) == identities(5)
    own = [identities(start, at_own_position=True) for start in (0, 5)]
    assert own[0] != own[1]


def test_equal_spans_and_common_beginnings_are_computed_once():
    prefix, tokens = tuple(range(100, 130)), tuple(range(50))
    first = random_request(1, 0, [20, 25], 4)
    requests = [
        dataclasses.replace(first, prefix=prefix, segments=(tokens[:40], tokens[10:30])),
        dataclasses.replace(first, prefix=prefix, segments=(tokens[10:30], tokens[:20] * 2)),
    ]
    strategy = PrefixSegment()
    layouts = [strategy.layout(one) for one in requests]
    parts = divide(known(strategy, layouts), [[], []])
    counts = [len(part.slots) for part in parts]
    # Once each: the prefix, 20 tokens of two segments, the first 20 that two have in common.
    assert sum(counts) == sum(len(layout) - 1 for layout in layouts) - 30 - 20 - 20
    stream = [0] * sum(len(part.slots) for part in parts)
    for layout, part in zip(layouts, parts, strict=True):
        for slot in part.slots:
            stream[part.tokens[slot]] = layout.token_ids[slot]
    for layout, part in zip(layouts, parts, strict=True):
        assert [stream[index] for index in part.tokens] == list(layout.token_ids[:-1])


def test_what_is_copied_is_not_computed():
    strategy = PrefixSegment()
    layouts = [strategy.layout(random_request(seed, 20, [30, 20], 4)) for seed in (1, 1)]
    parts = divide(known(strategy, layouts), [[(20, 50)], []])
    assert (parts[0].tokens[20:50] == COPIED).all()
    assert set(range(20, 50)) <= set(parts[1].slots.tolist())  # it is not there to be given
    assert not set(range(20)) & set(parts[1].slots.tolist())


@pytest.mark.parametrize(("copied", "shared"), [((20, 20), 25), ((20, 0), 0), ((0, 20), 0)])
def test_a_beginning_behind_copied_tokens_is_computed_once(copied, shared):
    begin = tuple(range(3, 48))
    requests = [TokenizedRequest((), ((*begin, 60 + n, 61, 62),), (5,)) for n in range(2)]
    layouts = [Causal().layout(request) for request in requests]
    parts = divide(known(Causal(), layouts), [[(0, count)] if count else [] for count in copied])
    computed = sum(len(part.slots) for part in parts)
    assert computed == 2 * 48 - sum(copied) - shared
    for part, count in zip(parts, copied, strict=True):
        assert (part.tokens[:count] == COPIED).all()
        assert (part.tokens[count:] >= 0).all()
    at = slice(20, 45)
    assert (parts[0].tokens[at] == parts[1].tokens[at]).all() == bool(shared)


@settings(max_examples=60, deadline=None)
@given(mask=random_masks(), first=st.integers(0, SIZE - 12), size=st.integers(2, 11))
def test_bounds_of_a_region_hold_for_all_of_its_pairs(mask, first, size):
    try:
        dense = create_mask(mask, 3, 3, SIZE, SIZE, "cpu")[0, 0]
    except (RuntimeError, TypeError):  # what a mask itself cannot do is tested elsewhere
        return
    slots = torch.tensor([[first, first + size - 1]])
    row = torch.tensor([0])
    last = first + size
    square = dense[first:last, first:last]
    below = torch.ones(size, size, dtype=torch.bool).tril()
    try:
        for regions, pairs in (
            (Regions.below_diagonal(row, slots), square[below]),
            (Regions.above_diagonal(row, slots), square[~below]),
            (Regions.rectangles(row, slots, slots), square),
        ):
            certain, possible = region_values(mask, regions)[:, 0].tolist()
            assert pairs.all() or not certain
            assert possible or not pairs.any()
    except MaskError:
        return


@pytest.mark.parametrize("window", [3, 5, 40])
def test_a_window_within_a_span_is_noticed(window):
    def windowed(b, h, q_idx, kv_idx):
        return causal(b, h, q_idx, kv_idx) & (q_idx - kv_idx < window)

    rows, spans = torch.tensor([0, 0]), torch.tensor([[0, 3], [10, 30]])
    seen = spans_see(windowed, rows, spans, [[], [(0, 9)]], torch.tensor([40, 40]))
    assert seen.tolist() == [window >= 4, window >= 31]
    rows, firsts = torch.tensor([0, 0]), torch.tensor([1, 20])
    assert rows_are_causal(windowed, rows, firsts, 4, 40).tolist() == [window >= 5, window >= 24]
