"""Reduces a picture to a grid of cells, which every renderer draws."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from flexmask.block_mask.tile_states import EMPTY, FULL, PARTIAL
from flexmask.show import palette
from flexmask.show.mask_picture import MaskDifference, MaskPicture, Picture
from flexmask.show.palette import part_colour, rgb


class CellState(enum.IntEnum):
    """The state of a cell: a pair of tokens, or a square of them in a coarser picture."""

    MASKED = 0
    """A masked pair in a tile that is computed; in a difference: allowed by neither mask."""
    SKIPPED = 1
    """A pair in an empty tile, which kernels skip; or an empty tile."""
    SEEN = 2
    """An allowed pair."""
    PARTIAL = 3
    """A tile in which some pairs are allowed."""
    FULL = 4
    """A tile in which all pairs are allowed."""
    SAME = 5
    """Every pair of the cell that one mask allows, the other allows too."""
    ONLY_FIRST = 6
    """The first mask allows pairs of the cell that the second does not."""
    ONLY_SECOND = 7
    """The second mask allows pairs of the cell that the first does not."""
    EITHER = 8
    """Each mask allows pairs of the cell that the other does not."""


COLOURS = {
    CellState.MASKED: palette.MASKED_COLOUR,
    CellState.SKIPPED: palette.SKIPPED_COLOUR,
    CellState.PARTIAL: palette.PARTIAL_COLOUR,
    CellState.FULL: palette.FULL_COLOUR,
    CellState.SAME: palette.SAME_COLOUR,
    CellState.ONLY_FIRST: palette.FIRST_COLOUR,
    CellState.ONLY_SECOND: palette.SECOND_COLOUR,
    CellState.EITHER: palette.EITHER_COLOUR,
}
"""Colour of each state except SEEN, which has the colour of the key's part."""


@dataclass(frozen=True)
class CellGrid:
    """The cells of a picture.

    Attributes:
        side: Tokens along a side of a cell.
        cells: `CellState` of each cell, queries down and keys across: ``(n, n)`` uint8.
    """

    side: int
    cells: Tensor

    def colours(self, picture: Picture) -> Tensor:
        """Return red, green and blue of each cell: ``(n, n, 3)`` uint8."""
        table = torch.zeros(len(CellState), 3, dtype=torch.uint8)
        for cell, colour in COLOURS.items():
            table[cell] = torch.tensor(rgb(colour), dtype=torch.uint8)
        colours = table[self.cells.long()]
        if self.side == 1:
            keys = torch.zeros(picture.size, 3, dtype=torch.uint8)
            for band in picture.tokens.bands:
                part = rgb(part_colour(band.segment_id, band.is_generated))
                keys[band.start : band.stop] = torch.tensor(part, dtype=torch.uint8)
            seen = (self.cells == CellState.SEEN)[..., None]
            colours = torch.where(seen, keys[None].expand_as(colours), colours)
        return colours

    def legend(self, picture: Picture) -> list[tuple[CellState, str]]:
        """Return the meanings of the states that occur, most important first."""
        meanings = _meanings(picture, self.side)
        present = set(self.cells.unique().tolist())
        return [(cell, meaning) for cell, meaning in meanings.items() if cell in present]


def cell_grid(picture: Picture, side: int) -> CellGrid:
    """Reduce a picture to cells of ``side`` × ``side`` tokens."""
    if isinstance(picture, MaskDifference):
        return CellGrid(side, _differences(picture, side))
    return CellGrid(side, _tokens(picture) if side == 1 else _tiles(picture, side))


def _meanings(picture: Picture, side: int) -> dict[CellState, str]:
    if isinstance(picture, MaskDifference):
        return {
            CellState.SAME: "both see",
            CellState.ONLY_FIRST: f"only {picture.first_title}",
            CellState.ONLY_SECOND: f"only {picture.second_title}",
            CellState.EITHER: "each sees what the other does not",
            CellState.MASKED: "neither sees",
        }
    if side == 1:
        return {
            CellState.SEEN: "sees",
            CellState.MASKED: "does not see",
            CellState.SKIPPED: "does not see: tile skipped",
        }
    if side == picture.mask.tile:
        return {
            CellState.FULL: "full tile",
            CellState.PARTIAL: "partial tile",
            CellState.SKIPPED: "empty tile, skipped",
        }
    return {CellState.FULL: "sees all", CellState.PARTIAL: "some", CellState.SKIPPED: "none"}


def _tokens(picture: MaskPicture) -> Tensor:
    mask = picture.mask
    hidden = torch.where(mask.is_skipped, int(CellState.SKIPPED), int(CellState.MASKED))
    return torch.where(mask.dense, int(CellState.SEEN), hidden).byte()


def _tiles(picture: MaskPicture, side: int) -> Tensor:
    table = torch.zeros(3, dtype=torch.uint8)
    table[EMPTY], table[PARTIAL], table[FULL] = (
        CellState.SKIPPED,
        CellState.PARTIAL,
        CellState.FULL,
    )
    return table[picture.mask.at(side).states.long()]


def _differences(picture: MaskDifference, side: int) -> Tensor:
    layers = (picture.both, picture.only_first, picture.only_second)
    if side == 1:
        both, first, second = (layer.dense for layer in layers)
    else:
        both, first, second = (layer.at(side).states != EMPTY for layer in layers)
    cells = torch.where(both, int(CellState.SAME), int(CellState.MASKED))
    cells[first] = int(CellState.ONLY_FIRST)
    cells[second] = int(CellState.ONLY_SECOND)
    cells[first & second] = int(CellState.EITHER)
    return cells.byte()
