"""Colours that are distinct with any colour vision, and when printed in grey.

Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), without its yellow, which is hardly
visible on white.
"""

from __future__ import annotations

from flexmask.layout import PREFIX, TAIL

SEGMENT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Colours of segments 1, 2, …, repeated from the start after the last."""
PREFIX_COLOUR = "#9A9A9A"
TAIL_COLOUR = "#5E5E5E"
GENERATED_COLOUR = "#AA4499"

SKIPPED_COLOUR = "#E9E9E6"
MASKED_COLOUR = "#FFFFFF"
PARTIAL_COLOUR = "#E69F00"
FULL_COLOUR = "#0072B2"

SAME_COLOUR = "#B4B4B0"
FIRST_COLOUR = "#0072B2"
SECOND_COLOUR = "#D55E00"
EITHER_COLOUR = "#AA4499"


def part_colour(segment_id: int, is_generated: bool = False) -> str:
    """Return the colour of a part of a request, as ``#RRGGBB``."""
    if is_generated:
        return GENERATED_COLOUR
    if segment_id == PREFIX:
        return PREFIX_COLOUR
    if segment_id == TAIL:
        return TAIL_COLOUR
    return SEGMENT_COLOURS[(segment_id - 1) % len(SEGMENT_COLOURS)]


def rgb(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue of ``#RRGGBB``, 0 to 255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def ink_on(colour: str) -> str:
    """Return black or white, whichever contrasts more with ``#RRGGBB`` (WCAG 2's luminance)."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (number / 255 for number in rgb(colour))
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#FFFFFF"
