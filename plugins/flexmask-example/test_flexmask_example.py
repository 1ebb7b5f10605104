"""Holds the mask against its oracle, and checks the parameter."""

import pytest
import torch
from flexmask_example import RecentSegments

from flexmask import TokenizedRequest
from flexmask.errors import StrategyError
from flexmask.layout_batch import LayoutBatch

REQUEST = TokenizedRequest(prefix=(1, 2), segments=((3, 4), (5,), (6, 7, 8), (9,)), tail=(10, 11))


@pytest.mark.parametrize("reach", [0, 1, 2, 4])
def test_the_mask_allows_what_the_oracle_allows(reach):
    strategy = RecentSegments(reach)
    layout = strategy.layout(REQUEST)
    batch = LayoutBatch(batch_size=1, capacity=len(layout), device=torch.device("cpu"))
    batch.load([layout], num_tokens=[len(layout)], starts=[0])

    row = head = torch.tensor(0)
    slots = torch.arange(len(layout))
    mask = strategy.mask_mod(batch)(row, head, slots[:, None], slots[None, :])

    oracle = [[strategy.allowed(layout, int(q), int(kv)) for kv in slots] for q in slots]
    assert mask.tolist() == oracle


def test_a_segment_sees_the_one_before_it_but_not_the_one_before_that():
    strategy = RecentSegments(reach=1)
    layout = strategy.layout(REQUEST)
    first, second, third = (layout.segment_ids.index(number) for number in (1, 2, 3))
    assert strategy.allowed(layout, third, second)
    assert not strategy.allowed(layout, third, first)


def test_reach_is_parsed_from_text():
    assert RecentSegments.from_parameters({"reach": "2"}) == RecentSegments(reach=2)


def test_a_negative_reach_is_refused():
    with pytest.raises(StrategyError, match="reach must not be negative, got -1"):
        RecentSegments(reach=-1)
