"""Renders pictures as one self-contained, interactive HTML page that loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexmask.show import palette
from flexmask.show.answer_text import VERDICTS, logprobs_text, marked_pieces, shares_text
from flexmask.show.mask_picture import MaskDifference, Picture
from flexmask.show.picture_source import Subject
from flexmask.show.tile_mask import TileMask
from flexmask.show.tokens import DrawnTokens
from flexmask.web_page import render_page

SCRIPTS = ("tile_mask.js", "matrix.js", "token_list.js", "page.js")
"""Scripts in the order in which they are joined: each uses names of the ones before it."""

MAX_PAIRS = 2**27
"""Most pairs of partial tiles that a page holds, 16 MiB: those of 8,192 tiles of 128."""

_NO_PAIRS = -1


def page_html(pictures: Sequence[Picture], subject: Subject) -> str:
    """Return the HTML of the page.

    Args:
        pictures: Pictures of one request, shown side by side.
        subject: The request, and the answer of a run.
    """
    answer = subject.answer
    attention = (answer and answer.attention) or ()
    mean = answer and answer.mean_attention
    return render_page(
        "flexmask.show",
        SCRIPTS,
        style=_colours(),
        data={
            "panels": [_panel(picture) for picture in pictures],
            "attention": list(map(shares_text, attention)),
        },
        title=subject.heading,
        answer=answer,
        pieces=list(marked_pieces(answer.generation, answer.accepted)) if answer else [],
        attention=shares_text(mean) if mean else "",
        logprob=logprobs_text(answer.logprobs) if answer and answer.logprobs else "",
        verdict=VERDICTS[answer.is_correct] if answer else "",
    )


def save_page(pictures: Sequence[Picture], subject: Subject, path: Path) -> None:
    """Write the page to a file; arguments as for `page_html`."""
    path.write_text(page_html(pictures, subject), encoding="utf-8")


def _colours() -> str:
    parts = {
        "prefix": palette.PREFIX_COLOUR,
        "tail": palette.TAIL_COLOUR,
        "generated": palette.GENERATED_COLOUR,
    }
    parts |= {f"segment-{n}": colour for n, colour in enumerate(palette.SEGMENT_COLOURS)}
    names = parts | {
        "partial": palette.PARTIAL_COLOUR,
        "full": palette.FULL_COLOUR,
        "same": palette.SAME_COLOUR,
        "first": palette.FIRST_COLOUR,
        "second": palette.SECOND_COLOUR,
    }
    names |= {f"on-{name}": palette.ink_on(colour) for name, colour in parts.items()}
    return ":root {" + "".join(f"--{name}: {colour};" for name, colour in names.items()) + "}\n"


def _panel(picture: Picture) -> dict[str, Any]:
    panel = _tokens(picture.tokens) | {"title": picture.title, "size": picture.size}
    if isinstance(picture, MaskDifference):
        layers = [
            ("both see", "same", picture.both),
            (f"only {picture.first_title}", "first", picture.only_first),
            (f"only {picture.second_title}", "second", picture.only_second),
        ]
    else:
        layers = [("sees", "", picture.mask)]
    return panel | {
        "tile": layers[0][2].tile,
        "summary": picture.summary,
        "layers": [_layer(*layer) for layer in layers],
    }


def _tokens(tokens: DrawnTokens) -> dict[str, Any]:
    return {
        "promptTokens": tokens.prompt_tokens,
        "bands": [
            [band.label, _colour_name(band.segment_id, band.is_generated), band.start, band.stop]
            for band in tokens.bands
        ],
        "positions": _consecutive(tokens.position_ids),
        "origins": _consecutive(tokens.origins),
        "texts": tokens.texts,
    }


def _colour_name(segment_id: int, is_generated: bool) -> str:
    if is_generated:
        return "generated"
    if segment_id < 0:
        return "tail"
    if segment_id == 0:
        return "prefix"
    return f"segment-{(segment_id - 1) % len(palette.SEGMENT_COLOURS)}"


def _consecutive(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Compress consecutive numbers: index and value of each that does not continue the last."""
    return [
        (index, number)
        for index, number in enumerate(numbers)
        if index == 0 or number != numbers[index - 1] + 1
    ]


def _layer(name: str, colour: str, mask: TileMask) -> dict[str, Any]:
    """Return tile states, and the bitmap of each partial tile; equal bitmaps are stored once."""
    tiles = mask.partial_tiles
    numbers = np.full(len(tiles), _NO_PAIRS, dtype="<i4")
    bitmaps: dict[bytes, int] = {}
    detailed = tiles[: MAX_PAIRS // mask.tile**2]
    for index, pairs in enumerate(pairs for some in mask.pairs(detailed) for pairs in some):
        numbers[index] = bitmaps.setdefault(_bitmap(pairs), len(bitmaps))
    return {
        "name": name,
        "colour": colour,
        "states": _base64(mask.states.to(torch.uint8).contiguous().numpy().tobytes()),
        "bitmapOfTile": _base64(numbers.tobytes()),
        "bitmaps": [_base64(bitmap) for bitmap in bitmaps],
    }


def _bitmap(pairs: Tensor) -> bytes:
    return np.packbits(pairs.numpy(), bitorder="little").tobytes()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
