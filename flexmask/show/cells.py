"""The cells of a picture at some resolution: what every renderer draws."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from flexmask.block_mask.tile_states import EMPTY, FULL, PARTIAL
from flexmask.show import palette
from flexmask.show.mask_picture import MaskDifference, MaskPicture, Picture
from flexmask.show.palette import part_colour, rgb


class Cell(enum.IntEnum):
    """What a cell shows."""

    MASKED = 0
    """Not allowed, in a tile that is computed; between two masks: allowed by neither."""
    SKIPPED = 1
    """In an empty tile, which kernels skip; or such a tile."""
    SEEN = 2
    """An allowed pair."""
    PARTIAL = 3
    """A tile in which some pairs are allowed."""
    FULL = 4
    """A tile in which all are."""
    SAME = 5
    """Allowed by both masks, here and nowhere else in the cell."""
    ONLY_FIRST = 6
    """Allowed by the first mask alone, somewhere in the cell."""
    ONLY_SECOND = 7
    """Allowed by the second mask alone, somewhere in the cell."""
    EITHER = 8
    """Each mask allows something there that the other does not."""


COLOURS = {
    Cell.MASKED: palette.MASKED_COLOUR,
    Cell.SKIPPED: palette.SKIPPED_COLOUR,
    Cell.PARTIAL: palette.PARTIAL_COLOUR,
    Cell.FULL: palette.FULL_COLOUR,
    Cell.SAME: palette.SAME_COLOUR,
    Cell.ONLY_FIRST: palette.FIRST_COLOUR,
    Cell.ONLY_SECOND: palette.SECOND_COLOUR,
    Cell.EITHER: palette.EITHER_COLOUR,
}
"""Colour of each cell but SEEN, which has the colour of its key's part."""


@dataclass(frozen=True)
class CellGrid:
    """The cells of a picture.

    Attributes:
        side: Tokens along a side of a cell.
        cells: A `Cell` for each, queries down and keys across, ``(n, n)`` uint8.
    """

    side: int
    cells: Tensor

    def colours(self, picture: Picture) -> Tensor:
        """Red, green and blue of each cell, ``(n, n, 3)`` uint8."""
        table = torch.zeros(len(Cell), 3, dtype=torch.uint8)
        for cell, colour in COLOURS.items():
            table[cell] = torch.tensor(rgb(colour), dtype=torch.uint8)
        colours = table[self.cells.long()]
        if self.side == 1:
            keys = torch.zeros(picture.size, 3, dtype=torch.uint8)
            for band in picture.tokens.bands:
                part = rgb(part_colour(band.segment_id, band.is_generated))
                keys[band.start : band.stop] = torch.tensor(part, dtype=torch.uint8)
            seen = (self.cells == Cell.SEEN)[..., None]
            colours = torch.where(seen, keys[None].expand_as(colours), colours)
        return colours

    def legend(self, picture: Picture) -> list[tuple[Cell, str]]:
        """What the cells that there are mean, in the order of importance."""
        meanings = _meanings(picture, self.side)
        present = set(self.cells.unique().tolist())
        return [(cell, meaning) for cell, meaning in meanings.items() if cell in present]


def cell_grid(picture: Picture, side: int) -> CellGrid:
    """Find what each cell of ``side`` × ``side`` tokens shows."""
    if isinstance(picture, MaskDifference):
        return CellGrid(side, _differences(picture, side))
    return CellGrid(side, _tokens(picture) if side == 1 else _tiles(picture, side))


def _meanings(picture: Picture, side: int) -> dict[Cell, str]:
    if isinstance(picture, MaskDifference):
        return {
            Cell.SAME: "both see",
            Cell.ONLY_FIRST: f"only {picture.first_title}",
            Cell.ONLY_SECOND: f"only {picture.second_title}",
            Cell.EITHER: "each sees what the other does not",
            Cell.MASKED: "neither sees",
        }
    if side == 1:
        return {
            Cell.SEEN: "sees",
            Cell.MASKED: "does not see",
            Cell.SKIPPED: "does not see: tile skipped",
        }
    if side == picture.mask.tile:
        return {
            Cell.FULL: "full tile",
            Cell.PARTIAL: "partial tile",
            Cell.SKIPPED: "empty tile, skipped",
        }
    return {Cell.FULL: "sees all", Cell.PARTIAL: "some", Cell.SKIPPED: "none"}


def _tokens(picture: MaskPicture) -> Tensor:
    mask = picture.mask
    hidden = torch.where(mask.is_skipped, int(Cell.SKIPPED), int(Cell.MASKED))
    return torch.where(mask.dense, int(Cell.SEEN), hidden).byte()


def _tiles(picture: MaskPicture, side: int) -> Tensor:
    table = torch.zeros(3, dtype=torch.uint8)
    table[EMPTY], table[PARTIAL], table[FULL] = Cell.SKIPPED, Cell.PARTIAL, Cell.FULL
    return table[picture.mask.at(side).states.long()]


def _differences(picture: MaskDifference, side: int) -> Tensor:
    layers = (picture.both, picture.only_first, picture.only_second)
    if side == 1:
        both, first, second = (layer.dense for layer in layers)
    else:
        both, first, second = (layer.at(side).states != EMPTY for layer in layers)
    cells = torch.where(both, int(Cell.SAME), int(Cell.MASKED))
    cells[first] = int(Cell.ONLY_FIRST)
    cells[second] = int(Cell.ONLY_SECOND)
    cells[first & second] = int(Cell.EITHER)
    return cells.byte()
