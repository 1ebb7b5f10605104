"""Under which strategies a prompt of one segment says something of a fusion.

A fusion runs each segment as a prompt of its own. Causal attention or a sliding window read such a
prompt as they read any text. A strategy that treats prefix, segment and tail of it differently,
as block attention does, whose segments see no prefix, is made for several segments in one
prompt: alone, they are prompts without their instruction, and a fusion of those says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from flexmask.block_mask.equality import masks_are_equal
from flexmask.compare.cell import ATTENTION, Contender, Way
from flexmask.layout import Layout, TokenizedRequest
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import strategy_mask
from flexmask.plugins.registry import make_strategy
from flexmask.strategy import Strategy

_MASKED, _SCORED = (1500, 3000, 100), (10, 20, 5)
"""Tokens of prefix, segment and tail: longer than windows are, and few enough for every pair."""

_NEW_TOKENS = 3
_CPU = torch.device("cpu")


def with_plain_prompts(ways: Sequence[Way]) -> list[Way]:
    """Run fusions under plain causal prompts instead of strategies that tell parts of one apart.

    Ways that become the same stand once, where the first of them stood.

    Raises:
        StrategyError: If that is needed, and there is no strategy ``causal``.
    """
    tells_parts_apart_ = cache(tells_parts_apart)

    def plain(way: Way) -> Way:
        if way.fusion == ATTENTION or not tells_parts_apart_(way.contender.strategy):
            return way
        return replace(way, contender=Contender("causal", make_strategy("causal", {})))

    return list(dict.fromkeys(map(plain, ways)))


def tells_parts_apart(strategy: Strategy) -> bool:
    """Whether a prompt of one segment depends on which of its tokens are the segment.

    The same tokens are laid out twice, with a prefix and with none. Layouts, masks and changes of
    scores must be the same. A strategy that fails at one segment cannot run such prompts at all.
    """
    try:
        return _masks_differ(strategy) or _scores_differ(strategy)
    except Exception:  # a strategy's own; its cell will say so
        return True


def _masks_differ(strategy: Strategy) -> bool:
    parted, whole = _layouts(strategy, *_MASKED)
    if (parted.token_ids, parted.position_ids) != (whole.token_ids, whole.position_ids):
        return True
    size = len(parted) + _NEW_TOKENS
    mask, other = (strategy_mask(strategy, _batch(layout)) for layout in (parted, whole))
    return not masks_are_equal(mask, other, 1, size, size, _CPU)


def _scores_differ(strategy: Strategy) -> bool:
    parted, whole = (_changed_scores(strategy, layout) for layout in _layouts(strategy, *_SCORED))
    return not torch.equal(parted, whole)


def _layouts(strategy: Strategy, *lengths: int) -> tuple[Layout, Layout]:
    """The same tokens with a prefix, and with none: all of it belongs to the segment."""
    first, second, end = accumulate(lengths)
    prefix, segment, tail = range(first), range(first, second), range(second, end)
    return (
        strategy.layout(TokenizedRequest(tuple(prefix), (tuple(segment),), tuple(tail))),
        strategy.layout(TokenizedRequest((), ((*prefix, *segment),), tuple(tail))),
    )


def _batch(layout: Layout) -> LayoutBatch:
    batch = LayoutBatch(1, len(layout) + _NEW_TOKENS, _CPU)
    batch.load([layout], [len(layout)], [0])
    batch.open_tail([len(layout)])
    return batch


def _changed_scores(strategy: Strategy, layout: Layout) -> Tensor:
    """Made-up scores as changed, and scales of the log-sum-exp: ``(2, 1, 1, Q, K)``."""
    batch, size = _batch(layout), len(layout) + _NEW_TOKENS
    b = h = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    q_idx, kv_idx = torch.arange(size).view(1, 1, -1, 1), torch.arange(size).view(1, 1, 1, -1)
    scores = torch.sin(torch.arange(size * size, dtype=torch.float32)).view(1, 1, size, size)
    scales = torch.ones_like(scores)
    if score_mod := strategy.score_mod(batch):
        scores = score_mod(scores, b, h, q_idx, kv_idx)
    if part := strategy.scaled_part(batch):
        scales = torch.where(part.queries(b, q_idx) & part.keys(b, kv_idx), part.scale, scales)
    # Pairs that are masked have no score.
    visible = strategy_mask(strategy, batch)(b, h, q_idx, kv_idx)
    return torch.stack([scores, scales]).masked_fill(~visible, 0)
