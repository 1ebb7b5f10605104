"""Each built-in strategy against its plain-Python oracle, and against its picture."""

import importlib
import re

import pytest
import torch

from flexmask.block_mask import create_block_mask
from flexmask.errors import RequestError, StrategyError
from flexmask.layout import PREFIX, TAIL, TokenizedRequest
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import and_masks, holds_tokens, within_window
from flexmask.plugins.registry import load_registry, make_strategy
from flexmask_strategies.adaptive_parallel import AdaptiveParallel
from flexmask_strategies.block_attention import BlockAttention
from flexmask_strategies.boundary_repair import BoundaryRepair
from flexmask_strategies.causal import Causal
from flexmask_strategies.dilated import Dilated
from flexmask_strategies.document import Document
from flexmask_strategies.ensemble_isolation import EnsembleIsolation
from flexmask_strategies.few_shot_isolation import FewShotIsolation
from flexmask_strategies.global_window import GlobalWindow
from flexmask_strategies.parallel_context import ParallelContext
from flexmask_strategies.prefix_lm import PrefixLM
from flexmask_strategies.prefix_segment import PrefixSegment
from flexmask_strategies.sliding_window import SlidingWindow
from flexmask_strategies.strided import Strided
from flexmask_strategies.tree import Tree
from oracles import dense_mask, random_request

ISOLATING = [
    PrefixSegment(),
    PrefixSegment(positions="sequential"),
    EnsembleIsolation(),
    EnsembleIsolation(positions="sequential"),
    ParallelContext(),
    AdaptiveParallel(),
    BlockAttention(),
]
FUSING = [
    *ISOLATING,
    Causal(),
    PrefixLM(),
    ParallelContext(n_windows=1),
    GlobalWindow(window=3),
    Tree(),
    Tree("0,1,2,3"),
    FewShotIsolation(),
    FewShotIsolation(0, positions="sequential"),
]
STRATEGIES = [
    *FUSING,
    SlidingWindow(window=3),
    SlidingWindow(window=2, sinks=4),
    Dilated(window=3, dilation=2),
    Dilated(window=2, dilation=1),
    Strided(stride=3),
    Document(),
    BoundaryRepair(),
    BoundaryRepair(link_tokens=2, positions="restart"),
]
REQUESTS = [
    random_request(1, 4, [5], 1),
    random_request(2, 0, [3, 4], 2),
    random_request(3, 7, [1, 9, 2, 6], 3),
]


def over_slots(mask_mod, row, size):
    q_idx, kv_idx = torch.arange(size)[:, None], torch.arange(size)[None, :]
    return mask_mod(torch.tensor(row), torch.tensor(0), q_idx, kv_idx)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_the_mask_mod_equals_the_oracle_for_every_row_of_a_batch(strategy):
    layouts = [strategy.layout(request) for request in REQUESTS]
    lengths = [len(layout) for layout in layouts]
    batch = LayoutBatch(len(layouts), 64, torch.device("cpu"))
    batch.load(layouts, lengths, [0, 5, 2])
    mask_mod = and_masks(strategy.mask_mod(batch), holds_tokens(batch))
    for row, (layout, start) in enumerate(zip(layouts, [0, 5, 2], strict=True)):
        got = over_slots(mask_mod, row, 64)
        want = torch.zeros(64, 64, dtype=torch.bool)
        stop = start + len(layout)
        want[start:stop, start:stop] = dense_mask(strategy, layout)
        assert torch.equal(got, want)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_every_token_sees_itself_and_nothing_later(strategy):
    for request in REQUESTS:
        layout = strategy.layout(request)
        mask = dense_mask(strategy, layout)
        assert mask.diagonal().all()
        first = layout.segment_ids.count(PREFIX) if isinstance(strategy, PrefixLM) else 0
        assert mask[:first, :first].all()
        assert not mask[first:].triu(1 + first).any()


@pytest.mark.parametrize("strategy", FUSING, ids=str)
def test_the_tail_and_generated_tokens_see_everything_before(strategy):
    for request in REQUESTS:
        layout = strategy.layout(request).extended(2)
        mask = dense_mask(strategy, layout)
        for slot in range(layout.tail_start, len(layout)):
            assert mask[slot, : slot + 1].all()


@pytest.mark.parametrize("strategy", [*ISOLATING, Document()], ids=str)
def test_segments_never_see_each_other(strategy):
    layout = strategy.layout(REQUESTS[2])
    for q_idx, q_segment in enumerate(layout.segment_ids):
        for kv_idx, kv_segment in enumerate(layout.segment_ids):
            if q_segment > 0 and kv_segment > 0 and q_segment != kv_segment:
                assert not strategy.allowed(layout, q_idx, kv_idx)


def test_the_prefix_is_stored_once_or_in_every_segment():
    request = random_request(4, 3, [2, 2], 1)
    assert PrefixSegment().layout(request).segment_ids.count(PREFIX) == 3
    copied = EnsembleIsolation().layout(request)
    assert copied.token_ids == (
        *request.prefix, *request.segments[0], *request.prefix, *request.segments[1], *request.tail
    )  # fmt: skip


PICTURED = {
    Causal(): ((1, 2), (3, 4), (5, 6)),
    PrefixSegment(): ((1, 2), (3, 4), (5, 6)),
    EnsembleIsolation(): ((1,), (2, 3), (4, 5)),
    SlidingWindow(window=3, sinks=1): ((1, 2), (3, 4), (5, 6)),
    PrefixLM(): ((1, 2), (3, 4), (5, 6)),
    Document(): ((1,), (2, 3), (4, 5)),
    ParallelContext(): ((1, 2), (3, 4), (5, 6)),
    AdaptiveParallel(): ((1, 2), (3, 4), (5, 6)),
    BlockAttention(): ((1, 2), (3, 4), (5, 6)),
    BoundaryRepair(link_tokens=1): ((1,), (2, 3), (4, 5), (6, 7)),
    Tree("0,0,1,1"): ((1,), (2,), (3,), (4,), (5,)),
    Dilated(window=3, dilation=2): ((1, 2), (3, 4), (5, 6)),
    Strided(stride=3): ((1, 2), (3, 4), (5, 6)),
    GlobalWindow(window=2): ((1, 2), (3, 4), (5, 6)),
    FewShotIsolation(examples=2): ((1,), (2,), (3,), (4,), (5,)),
}
"""What the docstring of each strategy shows: prefix and segments."""


@pytest.mark.parametrize("strategy", PICTURED, ids=str)
def test_the_picture_in_the_docstring_is_the_mask(strategy):
    text = importlib.import_module(type(strategy).__module__).__doc__
    assert text is not None
    rows = re.findall(r"^ {6}([P\dT]) ((?:#| )+)$", text, flags=re.MULTILINE)
    prefix, *segments = PICTURED[strategy]
    layout = strategy.layout(TokenizedRequest(prefix, tuple(segments), (7,)))
    parts = ["P" if s == PREFIX else "T" if s == TAIL else str(s) for s in layout.segment_ids]
    assert [part for part, _ in rows] == parts
    drawn = [[c == "#" for c in row.ljust(2 * len(parts))[::2]] for _, row in rows]
    assert drawn == dense_mask(strategy, layout).tolist()
    numbers = re.findall(r"^ {8}([\d ]+)$", text, flags=re.MULTILINE)
    assert [tuple(map(int, line.split())) for line in numbers] in ([], [layout.position_ids])


def test_every_built_in_strategy_is_tested_here():
    names = {strategy.name for strategy in STRATEGIES}
    assert names == {strategy.name for strategy in PICTURED}
    assert names == {registered.cls.name for registered in load_registry().strategies()}


def test_within_window_counts_positions_and_not_slots():
    strategy = PrefixSegment()
    layout = strategy.layout(TokenizedRequest((1, 2), ((3, 4, 5), (6,)), (7,)))
    batch = LayoutBatch(1, 16, torch.device("cpu"))
    batch.load([layout], [len(layout)], [0])
    near = over_slots(within_window(batch, 2), 0, len(layout))
    assert layout.position_ids[5] - layout.position_ids[1] == 1
    assert near[5, 1]  # the second segment still sees the end of its prefix, four slots back
    assert not near[4, 1]


def test_equal_lengths_with_other_boundaries_make_other_block_masks():
    strategy = PrefixSegment()
    batch = LayoutBatch(2, 512, torch.device("cpu"))
    requests = [random_request(1, 10, [250, 100], 2), random_request(1, 10, [100, 250], 2)]
    layouts = [strategy.layout(request) for request in requests]
    batch.load(layouts, [len(layout) for layout in layouts], [0, 0])
    mask = create_block_mask(strategy.mask_mod(batch), 2, None, 384, 384)
    assert not torch.equal(mask.kv_num_blocks[0], mask.kv_num_blocks[1])


def test_tail_slots_open_after_the_prompt():
    layout = Causal().layout(REQUESTS[0])
    batch = LayoutBatch(1, 16, torch.device("cpu"))
    batch.load([layout], [len(layout) - 1], [0])
    batch.open_tail([len(layout) - 1])
    assert batch.segment_ids[0, len(layout) - 1 :].eq(TAIL).all()
    assert batch.position_ids[0].tolist() == list(range(16))


REQUEST = TokenizedRequest((1, 2), ((3, 4, 5), (6,), (7, 8), (9,)), (10, 11))


def test_the_tail_of_packed_documents_continues_the_last():
    layout = Document().layout(REQUEST)
    assert layout.position_ids == (0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4)
    seen = dense_mask(Document(), layout.extended(1))[-1]
    assert [token for token, sees in zip(layout.token_ids, seen, strict=False) if sees] == [
        *(1, 2, 9, 10, 11)
    ]


def test_segments_of_one_context_window_follow_each_other():
    layout = ParallelContext(n_windows=2).layout(REQUEST)
    assert layout.segment_ids == (0, 0, 1, 1, 1, 1, 2, 2, 2, -1, -1)
    assert layout.position_ids == (0, 1, 2, 3, 4, 5, 2, 3, 4, 6, 7)
    layout = ParallelContext(n_windows=3).layout(REQUEST)
    assert [layout.segment_ids.count(number) for number in (1, 2, 3)] == [3, 1, 3]


def test_positions_in_a_tree_continue_those_of_the_parent():
    layout = Tree("0,0,1,1").layout(REQUEST)
    assert layout.position_ids == (0, 1, 2, 3, 4, 2, 5, 6, 5, 7, 8)
    chain = Tree("0,1,2,3,4")
    layout = chain.layout(REQUEST)
    assert layout == Causal().layout(REQUEST)
    assert torch.equal(dense_mask(chain, layout), dense_mask(Causal(), layout))


def test_each_path_of_a_tree_reads_as_one_text():
    tree, paths = Tree("0,0,1,1"), {1: [1], 2: [2], 3: [1, 3], 4: [1, 4]}
    layout = tree.layout(REQUEST)
    mask = dense_mask(tree, layout)
    for number, path in paths.items():
        last = max(slot for slot, s in enumerate(layout.segment_ids) if s == number)
        seen = [slot for slot in range(len(layout)) if mask[last, slot]]
        text = sum((REQUEST.segments[segment - 1] for segment in path), REQUEST.prefix)
        assert tuple(layout.token_ids[slot] for slot in seen) == text
        assert [layout.position_ids[slot] for slot in seen] == list(range(len(text)))


def test_repaired_tokens_and_the_tail_see_each_token_of_the_text_before_them_once():
    strategy = BoundaryRepair(link_tokens=2)
    layout = strategy.layout(REQUEST)
    mask, text = dense_mask(strategy, layout), Causal().layout(REQUEST).token_ids
    assert layout.segment_ids == (0, 0, 1, 1, 1, 2, 3, 4, 4, 5, 5, 6, 7, -1, -1)
    for q_idx, segment in enumerate(layout.segment_ids):
        seen = [slot for slot in range(len(layout)) if mask[q_idx, slot]]
        seen_text = tuple(layout.token_ids[slot] for slot in seen)
        if segment == TAIL or segment % 2 == 0:
            assert [layout.position_ids[slot] for slot in seen] == list(range(len(seen)))
            assert seen_text == text[: len(seen)]
        else:  # a document sees what it would see alone after the prefix
            document = REQUEST.segments[segment // 2]
            assert seen_text == (REQUEST.prefix + document)[: len(seen)]


def test_a_single_document_needs_no_repair():
    request = random_request(5, 3, [4], 2)
    layout = BoundaryRepair().layout(request)
    assert layout == Causal().layout(request)
    assert torch.equal(dense_mask(BoundaryRepair(), layout), dense_mask(Causal(), layout))


def test_paraphrases_of_the_question_start_after_the_longest_example():
    layout = FewShotIsolation(examples=1, paraphrases=2).layout(REQUEST)
    assert layout.position_ids == (0, 1, 2, 3, 4, 2, 5, 6, 5, 7, 8)
    assert FewShotIsolation(examples=2, paraphrases=2).layout(REQUEST).position_ids[-1] == 6
    sequential = FewShotIsolation(2, positions="sequential").layout(REQUEST)
    assert sequential.position_ids == tuple(range(len(sequential)))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            Tree("0,0,1"),
            "parents=0,0,1 names the parents of 3 segments, got 4; name the parent of each",
        ),
        (ParallelContext(n_windows=5), "n_windows=5 needs at least as many segments, got 4"),
        (
            FewShotIsolation(examples=2, paraphrases=3),
            "examples=2 times paraphrases=3 need 6 segments, got 4",
        ),
    ],
)
def test_a_request_with_too_few_segments_or_too_many_is_refused(strategy, message):
    with pytest.raises(RequestError) as error:
        strategy.layout(REQUEST)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("prefix_segment", {"positions": "x"}, "positions must be restart|sequential, got 'x'"),
        ("prefix_segment", {"w": "3"}, "has no parameter 'w'; it takes: positions"),
        ("sliding_window", {"window": "-3"}, "window must be positive, got -3"),
        ("sliding_window", {"sinks": "-1"}, "sinks must not be negative, got -1"),
        ("dilated", {"window": "0"}, "window must be positive, got 0"),
        ("dilated", {"dilation": "0"}, "dilation must be positive, got 0"),
        ("boundary_repair", {"link_tokens": "0"}, "link_tokens must be positive, got 0"),
        ("strided", {"stride": "0"}, "stride must be positive, got 0"),
        ("global_window", {"window": "0"}, "window must be positive, got 0"),
        ("parallel_context", {"n_windows": "-1"}, "n_windows must not be negative, got -1"),
        (
            "adaptive_parallel",
            {"temperature": "0"},
            "temperature must be a positive number, got 0.0",
        ),
        ("adaptive_parallel", {"scale": "-1"}, "scale must be a positive number, got -1.0"),
        ("adaptive_parallel", {"scale": "inf"}, "scale must be a positive number, got inf"),
        ("few_shot_isolation", {"examples": "-1"}, "examples must not be negative, got -1"),
        ("few_shot_isolation", {"paraphrases": "0"}, "paraphrases must be positive, got 0"),
        ("tree", {"parents": "0,2"}, "or 0 for the prefix, as in 0,0,1,1; got '0,2'"),
        ("tree", {"parents": "0,-1"}, "got '0,-1'"),
        ("tree", {"parents": "0;0"}, "got '0;0'"),
        ("tree", {"parents": ""}, "got ''"),
    ],
)
def test_a_wrong_parameter_is_named(name, parameters, message):
    with pytest.raises(StrategyError) as error:
        make_strategy(name, parameters)
    assert message in str(error.value)


def test_parameters_come_from_text():
    strategy = make_strategy("ensemble_isolation", {"positions": "sequential"})
    assert strategy == EnsembleIsolation(positions="sequential")
    assert strategy.parameter_values() == {"positions": "sequential"}
