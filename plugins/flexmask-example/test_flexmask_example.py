"""Checks the strategy against flexmask's rules, and its mask against the docstring's picture."""

import inspect
import re

import pytest
import torch
from flexmask_example import recent_segments

from flexmask import TokenizedRequest
from flexmask.check import check_strategy
from flexmask.errors import StrategyError
from flexmask.layout_batch import LayoutBatch


def test_the_strategy_keeps_every_rule() -> None:
    findings = check_strategy(recent_segments(reach=2))
    assert not findings, findings[0]


def test_the_mask_is_the_picture_in_the_docstring() -> None:
    strategy = recent_segments(reach=1)
    layout = strategy.layout(TokenizedRequest((1,), ((2, 3), (4, 5), (6, 7)), (8,)))
    batch = LayoutBatch(batch_size=1, capacity=len(layout), device=torch.device("cpu"))
    batch.load([layout], num_tokens=[len(layout)], starts=[0])
    slots, zero = torch.arange(len(layout)), torch.tensor(0)
    mask = strategy.mask_mod(batch)(zero, zero, slots[:, None], slots[None, :])

    docstring = str(inspect.getmodule(recent_segments).__doc__)
    rows = re.findall(r"^ +[P123T] ((?:#| )+)$", docstring, flags=re.MULTILINE)
    drawn = [[cell == "#" for cell in row.ljust(2 * len(slots))[::2]] for row in rows]
    assert mask.tolist() == drawn


def test_a_negative_reach_is_refused() -> None:
    with pytest.raises(StrategyError, match="reach must not be negative, got -1"):
        recent_segments(reach=-1)
