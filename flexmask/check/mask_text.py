"""Masks as text: a character per pair or tile, headed by the parts of the layout."""

from __future__ import annotations

from collections.abc import Sequence

from flexmask.layout import PREFIX, TAIL

SEES, SEES_NOT = "#", "."


def draw(rows: Sequence[str], q_segments: Sequence[int], kv_segments: Sequence[int]) -> str:
    """Head rows and columns of a picture with the part that their first token belongs to.

    Args:
        rows: For each query the characters of its keys.
        q_segments: Segment id of each row.
        kv_segments: Segment id of each column.
    """
    heading = "   " + "".join(_part(segment)[-1] for segment in kv_segments)
    lines = (f"{_part(segment):>2} {row}" for segment, row in zip(q_segments, rows, strict=True))
    return "\n".join([heading, *lines])


def _part(segment_id: int) -> str:
    return {PREFIX: "P", TAIL: "T"}.get(segment_id, str(segment_id))
