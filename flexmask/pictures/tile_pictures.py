"""Tiles of an explained mask, whatever it is a mask of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexmask.block_mask.tile_states import EMPTY, FULL, PARTIAL
from flexmask.pictures.palette import FULL_COLOUR, PARTIAL_COLOUR, SKIPPED_COLOUR, rgb

if TYPE_CHECKING:
    from flexmask.block_mask import MaskReport

STATE_COLOURS = {EMPTY: SKIPPED_COLOUR, PARTIAL: PARTIAL_COLOUR, FULL: FULL_COLOUR}


def report_colours(
    report: MaskReport, max_cells: int, b: int = 0, h: int = 0
) -> tuple[Tensor, int]:
    """Colours of the tiles of one batch row and head.

    Args:
        report: What `explain_mask` found.
        max_cells: Most cells along an axis; where there are more tiles, several share a cell,
            which counts as partial unless they are all alike.
        b: Batch row.
        h: Head.

    Returns:
        Red, green and blue, ``(rows, columns, 3)`` uint8, and how many tiles a cell is wide.
    """
    states = report.states[b, h].cpu()
    step = -(-max(states.shape) // max_cells)
    lowest, highest = -_pooled(-states.float(), step), _pooled(states.float(), step)
    states = torch.where(lowest == highest, highest, PARTIAL).long()
    table = torch.tensor([rgb(STATE_COLOURS[state]) for state in (EMPTY, PARTIAL, FULL)])
    return table[states].byte(), step


def _pooled(states: Tensor, step: int) -> Tensor:
    pooled = torch.nn.functional.max_pool2d(states[None, None], step, ceil_mode=True)
    return pooled[0, 0]
