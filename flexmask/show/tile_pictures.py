"""Plots the tiles of an explained mask (`flexmask.explain_mask`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexmask.block_mask.tile_states import EMPTY, FULL, PARTIAL
from flexmask.show.palette import FULL_COLOUR, PARTIAL_COLOUR, SKIPPED_COLOUR, rgb
from flexmask.show.plotting import WIDTH_IN, check_matplotlib, figure_settings, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flexmask.block_mask import MaskReport

STATE_COLOURS = {EMPTY: SKIPPED_COLOUR, PARTIAL: PARTIAL_COLOUR, FULL: FULL_COLOUR}


MAX_CELLS = 512


def plot_report(report: MaskReport, ax: Axes | None = None, *, b: int = 0, h: int = 0) -> Axes:
    """Draw the tiles of an explained mask.

    Args:
        report: Result of `explain_mask`.
        ax: The axes to draw on; None creates a figure one column wide.
        b: Batch row.
        h: Head.

    Raises:
        FlexMaskError: If matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.patches import Patch

    with figure_settings():
        ax = ax or new_axes(WIDTH_IN * 1.2)
        colours, step = report_colours(report, MAX_CELLS, b, h)
        ax.imshow(colours.numpy(), interpolation="none")
        q_tile, kv_tile = report.block_mask.BLOCK_SIZE
        ax.set(
            title=f"{report.density:.1%} of pairs allowed",
            xlabel=f"key tile, {kv_tile * step} keys each",
            ylabel=f"query tile, {q_tile * step} queries each",
        )
        counts = {
            FULL: ("full", report.tiles_full),
            PARTIAL: ("partial", report.tiles_partial),
            EMPTY: ("empty", report.tiles_empty),
        }
        handles = [
            Patch(facecolor=STATE_COLOURS[state], label=f"{count:,} {name}")
            for state, (name, count) in counts.items()
        ]
        ax.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
            ncols=3,
            frameon=False,
            handlelength=1,
            handleheight=1,
        )
    return ax


def report_colours(
    report: MaskReport, max_cells: int, b: int = 0, h: int = 0
) -> tuple[Tensor, int]:
    """Return the colours of the tiles of one batch row and head.

    Args:
        report: Result of `explain_mask`.
        max_cells: Most cells along an axis; if there are more tiles, several share a cell, which
            is partial unless they all have the same state.
        b: Batch row.
        h: Head.

    Returns:
        Red, green and blue, ``(rows, columns, 3)`` uint8, and the side of a cell in tiles.
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
