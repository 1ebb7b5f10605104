"""Each built-in strategy against its plain-Python oracle, and against its picture."""

import importlib
import re

import pytest
import torch

from flexmask.block_mask import create_block_mask
from flexmask.errors import StrategyError
from flexmask.layout import PREFIX, TAIL, TokenizedRequest
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import and_masks, holds_tokens, within_window
from flexmask.registry import make_strategy
from flexmask_strategies.causal import Causal
from flexmask_strategies.ensemble_isolation import EnsembleIsolation
from flexmask_strategies.prefix_segment import PrefixSegment
from oracles import dense_mask, random_request

STRATEGIES = [
    Causal(),
    PrefixSegment(),
    PrefixSegment(positions="sequential"),
    EnsembleIsolation(),
    EnsembleIsolation(positions="sequential"),
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
        mask = dense_mask(strategy, strategy.layout(request))
        assert mask.diagonal().all()
        assert not mask.triu(1).any()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_the_tail_and_generated_tokens_see_everything_before(strategy):
    for request in REQUESTS:
        layout = strategy.layout(request).extended(2)
        mask = dense_mask(strategy, layout)
        for slot in range(layout.tail_start, len(layout)):
            assert mask[slot, : slot + 1].all()


@pytest.mark.parametrize("strategy", STRATEGIES[1:], ids=str)
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


@pytest.mark.parametrize("strategy", [Causal(), PrefixSegment(), EnsembleIsolation()], ids=str)
def test_the_picture_in_the_docstring_is_the_mask(strategy):
    module = importlib.import_module(type(strategy).__module__)
    rows = re.findall(r"^ +[P12T] ((?:#| )+)$", module.__doc__, flags=re.MULTILINE)
    if isinstance(strategy, EnsembleIsolation):
        request = TokenizedRequest(prefix=(1,), segments=((2, 3), (4, 5)), tail=(6,))
    else:
        request = TokenizedRequest(prefix=(1, 2), segments=((3, 4), (5, 6)), tail=(7,))
    mask = dense_mask(strategy, strategy.layout(request))
    drawn = [[character == "#" for character in row.ljust(14)[::2]] for row in rows]
    assert drawn == mask.tolist()


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


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"positions": "backwards"}, "positions must be restart|sequential, got 'backwards'"),
        ({"window": "3"}, "has no parameter 'window'; it takes: positions"),
    ],
)
def test_a_wrong_parameter_is_named(parameters, message):
    with pytest.raises(StrategyError) as error:
        make_strategy("prefix_segment", parameters)
    assert message in str(error.value)


def test_parameters_come_from_text():
    strategy = make_strategy("ensemble_isolation", {"positions": "sequential"})
    assert strategy == EnsembleIsolation(positions="sequential")
    assert strategy.parameter_values() == {"positions": "sequential"}
