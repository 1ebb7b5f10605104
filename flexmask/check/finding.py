"""Findings of a check: the broken rule, the place in the mask, and advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flexmask.check.cases import Case
from flexmask.layout import PREFIX, TAIL, Layout

SHOWN = 12
"""Rows of a picture of a long layout; it has twice as many columns."""

SEES, SEES_NOT = "#", "."


@dataclass(frozen=True)
class Finding:
    """A rule that a strategy breaks.

    Attributes:
        rule: Name of the rule.
        message: What is wrong, in a sentence.
        mend: Advice on how to correct it.
        layout: The smallest layout that breaks the rule, by its lengths; empty if the layout does
            not matter.
        q_idx: Slot of the query at fault, if there is one.
        kv_idx: Slot of the key at fault, if there is one.
        picture: The mask around the fault, in characters; empty if there is no such picture.
    """

    rule: str
    message: str
    mend: str
    layout: str = ""
    q_idx: int | None = None
    kv_idx: int | None = None
    picture: str = ""

    def __str__(self) -> str:
        """Return all of it, in several lines."""
        lines = [f"{self.rule}: {self.message}"]
        if self.layout:
            lines.append(f"  layout: {self.layout}")
        lines += [f"    {line}" for line in self.picture.splitlines()]
        return "\n".join([*lines, f"  mend: {self.mend}"])


@dataclass(frozen=True)
class Fault:
    """A violation that a rule reports; the runner adds the rule's name and advice.

    Attributes:
        message: What is wrong, in a sentence.
        case: The request.
        layout: Its layout, for the picture.
        mask: The mask to draw, ``(S, S)`` bool.
        q_idx: Slot of the query at fault.
        kv_idx: Slot of the key at fault; None for a whole row of the mask.
        mend: Advice, if it differs from that of the rule.
    """

    message: str
    case: Case | None = None
    layout: Layout | None = None
    mask: Tensor | None = None
    q_idx: int | None = None
    kv_idx: int | None = None
    mend: str = ""

    @property
    def picture(self) -> str:
        """The mask around the fault in characters; the pair or the row at fault is marked."""
        if self.layout is None or self.mask is None or self.q_idx is None:
            return ""
        segments = self.layout.segment_ids
        kv_idx = self.q_idx if self.kv_idx is None else self.kv_idx
        q_slots = _around(self.q_idx, len(segments), SHOWN)
        kv_slots = _around(kv_idx, len(segments), 2 * SHOWN)
        rows = [self._row(q_idx, kv_slots) for q_idx in q_slots]
        drawn = _headed(rows, [segments[q] for q in q_slots], [segments[kv] for kv in kv_slots])
        shown = f"slots {q_slots[0]}–{q_slots[-1]} down, {kv_slots[0]}–{kv_slots[-1]} across"
        marked = "< the row" if self.kv_idx is None else "! seen, ? unseen: the pair"
        return f"{drawn}\n{shown}; # sees, . does not, {marked} at fault"

    def _row(self, q_idx: int, kv_slots: range) -> str:
        assert self.mask is not None
        allowed = self.mask[q_idx].tolist()
        cells = [SEES if allowed[kv] else SEES_NOT for kv in kv_slots]
        if q_idx != self.q_idx:
            return "".join(cells)
        if self.kv_idx is None:
            return "".join([*cells, " <"])
        cells[self.kv_idx - kv_slots[0]] = "!" if allowed[self.kv_idx] else "?"
        return "".join(cells)


def _around(slot: int, size: int, shown: int) -> range:
    """Return at most ``shown`` of ``size`` slots, ``slot`` among them."""
    start = max(0, min(slot - shown // 2, size - shown))
    return range(start, min(size, start + shown))


def _headed(rows: Sequence[str], q_segments: Sequence[int], kv_segments: Sequence[int]) -> str:
    """Put a heading before each row and above each column: ``P``, a segment's number, or ``T``.

    Args:
        rows: For each query the characters of its keys.
        q_segments: Segment id of each row's token.
        kv_segments: Segment id of each column's token.
    """
    heading = "   " + "".join(_part(segment)[-1] for segment in kv_segments)
    lines = (f"{_part(segment):>2} {row}" for segment, row in zip(q_segments, rows, strict=True))
    return "\n".join([heading, *lines])


def _part(segment_id: int) -> str:
    return {PREFIX: "P", TAIL: "T"}.get(segment_id, str(segment_id))
