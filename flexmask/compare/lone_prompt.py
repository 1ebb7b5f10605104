"""Finds strategies under which prompts of a single segment are not meaningful.

A fusion runs each segment as a prompt of its own. Causal attention or a sliding window treat such
a prompt like any text. Other strategies treat its prefix, segment and tail differently: under
block attention, segments do not see the prefix. They are made for several segments in one prompt;
a single segment would be a prompt without its instruction, and its fusion meaningless.
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
"""Tokens of prefix, segment and tail: longer than usual windows, or few enough for all pairs."""

_NEW_TOKENS = 3
_CPU = torch.device("cpu")


def with_plain_prompts(ways: Sequence[Way]) -> list[Way]:
    """Replace strategies that `tells_parts_apart` finds by ``causal`` in ways that fuse prompts.

    Of ways that become equal, the first is kept.

    Raises:
        StrategyError: If the strategy ``causal`` is needed and not registered.
    """
    tells_parts_apart_ = cache(tells_parts_apart)

    def plain(way: Way) -> Way:
        if way.fusion == ATTENTION or not tells_parts_apart_(way.contender.strategy):
            return way
        return replace(way, contender=Contender("causal", make_strategy("causal", {})))

    return list(dict.fromkeys(map(plain, ways)))


def tells_parts_apart(strategy: Strategy) -> bool:
    """Return True if a prompt of one segment depends on which of its tokens are the segment.

    The same tokens are laid out twice, with and without a prefix. False requires equal layouts,
    masks and score changes. A strategy that raises at one segment cannot run such prompts at all.
    """
    try:
        return _masks_differ(strategy) or _scores_differ(strategy)
    except Exception:  # raised by the strategy; its cell reports it
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
    """Return layouts of the same tokens with a prefix, and without: all belong to the segment."""
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
    """Return synthetic scores as changed, and scales of the log-sum-exp: ``(2, 1, 1, Q, K)``."""
    batch, size = _batch(layout), len(layout) + _NEW_TOKENS
    b = h = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    q_idx, kv_idx = torch.arange(size).view(1, 1, -1, 1), torch.arange(size).view(1, 1, 1, -1)
    scores = torch.sin(torch.arange(size * size, dtype=torch.float32)).view(1, 1, size, size)
    scales = torch.ones_like(scores)
    if score_mod := strategy.applied_score_mod(batch):
        scores = score_mod(scores, b, h, q_idx, kv_idx)
    if part := strategy.scaled_part(batch):
        scales = torch.where(part.queries(b, q_idx) & part.keys(b, kv_idx), part.scale, scales)
    # Masked pairs have no score.
    visible = strategy_mask(strategy, batch)(b, h, q_idx, kv_idx)
    return torch.stack([scores, scales]).masked_fill(~visible, 0)
