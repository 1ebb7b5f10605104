"""Reads the masks back that a page holds, as its script does."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexmask.block_mask.tile_states import FULL, PARTIAL


def data_of(page: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    return data


def panels_of(page: str) -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = data_of(page)["panels"]
    return panels


def dense_layer(panel: dict[str, Any], layer: dict[str, Any]) -> NDArray[np.bool_]:
    """Every pair of a layer, ``(size, size)``."""
    tile, size = panel["tile"], panel["size"]
    tiles = -(-size // tile)
    states = np.frombuffer(base64.b64decode(layer["states"]), np.uint8).reshape(tiles, tiles)
    numbers = iter(np.frombuffer(base64.b64decode(layer["bitmapOfTile"]), "<i4"))
    bitmaps = [np.frombuffer(base64.b64decode(each), np.uint8) for each in layer["bitmaps"]]
    dense = np.zeros((tiles * tile, tiles * tile), dtype=bool)
    for (row, column), state in np.ndenumerate(states):
        corner = np.s_[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
        if state == FULL:
            dense[corner] = True
        elif state == PARTIAL:
            bits = np.unpackbits(bitmaps[next(numbers)], bitorder="little")
            dense[corner] = bits[: tile * tile].reshape(tile, tile)
    return dense[:size, :size]
