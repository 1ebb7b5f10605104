"""``flexmask show``: who sees whom in a layout, and what its BlockMask costs."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexmask.errors import OptionError
from flexmask.layout import TokenizedRequest
from flexmask.picture import SEES, SEES_NOT, SEES_SOME, draw
from flexmask_cli import render
from flexmask_cli.options import Parameters, StrategyName
from flexmask_cli.strategy_choice import choose_strategy, stdout_to_stderr

if TYPE_CHECKING:
    from flexmask.block_mask import MaskReport
    from flexmask.layout import Layout
    from flexmask.strategy import Strategy

TOKEN = 5
"""Stands for every token: a mask does not depend on them."""


FIGURES = (
    "tiles_empty",
    "tiles_partial",
    "tiles_full",
    "allowed_pairs",
    "density",
    "block_mask_bytes",
    "decided_by_intervals",
    "decided_by_evaluation",
    "build_ms",
)
"""What ``--stats`` prints of a `MaskReport`."""


def show(
    strategy: StrategyName = "ensemble_isolation",
    param: Parameters = None,
    prefix: Annotated[int, typer.Option(min=0, help="Tokens of the prefix.")] = 6,
    segments: Annotated[str, typer.Option(help="Tokens of each segment.")] = "8,6,7",
    suffix: Annotated[int, typer.Option(min=1, help="Tokens of the suffix.")] = 3,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print figures of the BlockMask, not a picture.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Draw the mask of a strategy for a request of given lengths."""
    chosen = choose_strategy(strategy, param)
    lengths = _parse_lengths(segments)
    request = TokenizedRequest(
        (TOKEN,) * prefix, tuple((TOKEN,) * length for length in lengths), (TOKEN,) * suffix
    )
    with stdout_to_stderr():
        layout = chosen.layout(request)
    if stats or as_json:
        report = _explain(chosen, layout, tile=128)
        figures = {"tokens": len(layout)} | {name: getattr(report, name) for name in FIGURES}
        if as_json:
            render.print_json(figures)
        else:
            render.print_figures(figures)
        return
    room = min(shutil.get_terminal_size().columns - 4, 100)
    render.print_line(picture(chosen, layout, room))


@stdout_to_stderr()
def _explain(strategy: Strategy, layout: Layout, tile: int) -> MaskReport:
    import torch

    from flexmask.block_mask import explain_mask
    from flexmask.layout_batch import LayoutBatch

    batch = LayoutBatch(1, len(layout), torch.device("cpu"))
    batch.load([layout], [len(layout)], [0])
    size = len(layout)
    return explain_mask(strategy.mask_mod(batch), 1, None, size, size, "cpu", tile)


def picture(strategy: Strategy, layout: Layout, room: int) -> str:
    """Draw a mask in at most ``room`` columns: a character per token, or per tile of tokens."""
    from flexmask.block_mask.tile_states import EMPTY, FULL

    tile = -(-len(layout) // room)
    states = _explain(strategy, layout, tile).states[0, 0]
    cell = {EMPTY: SEES_NOT, FULL: SEES}
    rows = ["".join(cell.get(state, SEES_SOME) for state in row) for row in states.tolist()]
    segments = layout.segment_ids[::tile]
    each = "one token" if tile == 1 else f"{tile} tokens"
    key = "# sees, . does not" if tile == 1 else "# sees all, + some, . none"
    return f"{draw(rows, segments, segments)}\na cell is {each} (q down, kv across): {key}"


def _parse_lengths(text: str) -> list[int]:
    lengths: list[Any] = text.split(",")
    if not all(length.strip().isdecimal() and int(length) for length in lengths):
        raise OptionError(f"--segments must be positive numbers as in 40,35,38, got {text!r}")
    return [int(length) for length in lengths]
