"""Rules about layouts and masks; each yields its faults, smallest layout first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexmask.block_mask import DecodeRowMask, create_block_mask
from flexmask.block_mask.intervals.legality import check_result, check_signature
from flexmask.check.cases import CASES, SAME_SHAPE, SMALL, Case
from flexmask.check.checked_strategy import CPU, Subject, capacity_for, evaluate, loaded_batch
from flexmask.check.finding import Fault
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.mod_types import MaskMod

ORACLE_PAIRS = 60_000
"""Largest number of pairs of one layout that are compared with the plain-Python oracle."""

GENERATED = 3
"""Number of tokens that are decoded after each prompt."""


def keeps_the_tokens(subject: Subject) -> Iterator[Fault]:
    """A layout contains every token of the request, and ends with the tail."""
    for case in CASES:
        layout, request = subject.layout(case), case.request()
        if not isinstance(layout, Layout):
            yield Fault(f"layout() returns {type(layout).__name__}, not a Layout", case)
            continue
        missing = {*request.prefix, *sum(request.segments, ())} - {*layout.token_ids}
        if missing:
            yield Fault(f"the layout leaves out {len(missing)} tokens of the request", case)
        if layout.token_ids[layout.tail_start :] != request.tail:
            yield Fault("the layout does not end with the tail's tokens", case)
        if layout != subject.strategy.layout(request):
            yield Fault("layout() returns another layout when it is called again", case)


def has_positions(subject: Subject) -> Iterator[Fault]:
    """Positions are ints, and those of the tail increase by one."""
    for case in CASES:
        layout = subject.layout(case)
        if not all(type(position) is int for position in layout.position_ids):
            kinds = {type(position).__name__ for position in layout.position_ids} - {"int"}
            yield Fault(f"positions must be ints, got {', '.join(sorted(kinds))}", case)
            continue
        tail = layout.position_ids[layout.tail_start :]
        if tail != tuple(range(tail[0], tail[0] + len(tail))):
            yield Fault(f"the tail's positions must go up by one, got {tail}", case)


def returns_bool(subject: Subject) -> Iterator[Fault]:
    """For one pair, mask_mod returns a 0-d bool tensor."""
    layout = subject.layout(SMALL[0])
    mask_mod = subject.strategy.mask_mod(loaded_batch([layout], [0]))
    if not callable(mask_mod):
        yield Fault(f"mask_mod(batch) returns {type(mask_mod).__name__}, not a function")
        return
    check_signature(mask_mod)
    check_result(mask_mod, mask_mod(*torch.tensor([0, 0, 1, 0]).unbind()))


def is_pointwise(subject: Subject) -> Iterator[Fault]:
    """The mask can be evaluated pair by pair, and its BlockMask can be built."""
    for case in CASES:
        size = len(subject.mask(case))
        batch = loaded_batch([subject.layout(case)], [0])
        mask_mod = subject.strategy.mask_mod(batch)
        create_block_mask(mask_mod, 1, None, size, size, CPU, pointwise_only=True)
    yield from ()


def is_deterministic(subject: Subject) -> Iterator[Fault]:
    """A mask that is built and evaluated again is the same."""
    for case in SMALL:
        layout = subject.layout(case)
        again = subject.mask_in(loaded_batch([layout], [0]), 0, 0, len(layout))
        yield from _differences(
            case, layout, again, subject.mask(case), "differs when the mask is built again"
        )


def has_no_empty_row(subject: Subject) -> Iterator[Fault]:
    """Every token sees at least one token."""
    for case in CASES:
        mask = subject.mask(case)
        for q_idx in (~mask.any(-1)).nonzero().flatten().tolist()[:1]:
            message = f"the token at slot {q_idx} sees no token at all"
            yield Fault(message, case, subject.layout(case), mask, q_idx)


def is_causal(subject: Subject) -> Iterator[Fault]:
    """No token sees a later one; under ``is_causal = False``, none sees the tail after it."""
    for case in CASES:
        layout, mask = subject.layout(case), subject.mask(case)
        later = mask.triu(1)
        if not subject.strategy.is_causal:
            later[:, : layout.tail_start] = False
        for q_idx, kv_idx in later.nonzero().tolist()[:1]:
            message = f"the token at slot {q_idx} sees slot {kv_idx}, which comes later"
            yield Fault(message, case, layout, mask, q_idx, kv_idx)


def equals_the_oracle(subject: Subject) -> Iterator[Fault]:
    """The mask allows what `Strategy.allowed` allows, if the strategy defines it."""
    strategy = subject.strategy
    if type(strategy).allowed is Strategy.allowed:
        return
    for case in CASES:
        layout, mask = subject.layout(case), subject.mask(case)
        size = range(len(layout))
        step = -(-(len(layout) ** 2) // ORACLE_PAIRS)
        for q_idx in size[::step]:
            wanted = torch.tensor([bool(strategy.allowed(layout, q_idx, kv)) for kv in size])
            for kv_idx in (mask[q_idx] != wanted).nonzero().flatten().tolist()[:1]:
                says, other = ("allows", "forbids") if wanted[kv_idx] else ("forbids", "allows")
                message = (
                    f"allowed() {says} slot {q_idx} to see slot {kv_idx}, the mask {other} it"
                )
                yield Fault(message, case, layout, mask, q_idx, kv_idx)
                break


def holds_in_any_slot(subject: Subject) -> Iterator[Fault]:
    """A layout has the same mask in another row and from a later slot on."""
    for case in SMALL:
        layout, start = subject.layout(case), 5
        others = subject.layout(case.rearranged())
        moved = loaded_batch([others, others, layout], [0, 2, start])
        mask = subject.mask_in(moved, 2, start, len(layout))
        yield from _differences(
            case, layout, mask, subject.mask(case), "changes when its row is padded on the left"
        )


def follows_the_batch(subject: Subject) -> Iterator[Fault]:
    """A mask_mod that was built for one batch is right for the next layout of the same shape."""
    first, *others = SAME_SHAPE
    layout = subject.layout(first)
    batch = loaded_batch([layout], [0])
    mask_mod = subject.strategy.mask_mod(batch)
    for case in others:
        layout = subject.layout(case)
        batch.load([layout], [len(layout)], [0])
        slots = torch.arange(len(layout))
        mask = evaluate(mask_mod, 0, slots, slots)
        yield from _differences(
            case, layout, mask, subject.mask(case), "is still that of the previous layout"
        )


def decodes_what_it_prefills(subject: Subject) -> Iterator[Fault]:
    """Rows that are decoded one by one equal those of the full mask."""
    for case in SMALL:
        layout = subject.layout(case)
        full = layout.extended(GENERATED)
        size = len(full)
        whole = loaded_batch([full], [0])
        mask = subject.mask_in(whole, 0, 0, size)
        first = len(layout) - 1  # the first decode step computes the last prompt token
        as_engine = LayoutBatch(1, capacity_for(size), CPU)
        as_engine.load([layout], [first], [0])
        as_engine.open_tail([first])
        for batch, slots in ((whole, range(size)), (as_engine, range(first, size))):
            decoded = _decoded(subject.strategy.mask_mod(batch), mask, slots)
            yield from _differences(case, full, decoded, mask, "differs when it is decoded")


def _decoded(mask_mod: MaskMod, mask: Tensor, slots: range) -> Tensor:
    """Return ``mask`` with the rows of ``slots`` replaced by those of decode, up to their slot."""
    decoded, keys = mask.clone(), torch.arange(len(mask))
    rows = DecodeRowMask(mask_mod, 1, len(mask), CPU)
    for slot in slots:
        rows.update(torch.tensor([slot]))
        row = evaluate(rows.block_mask.mask_mod, 0, torch.tensor([0]), keys)
        decoded[slot, : slot + 1] = row[0, : slot + 1]
    return decoded


def _differences(
    case: Case, layout: Layout, mask: Tensor, wanted: Tensor, how: str
) -> Iterator[Fault]:
    """Yield a fault for the first pair in which two masks differ."""
    for q_idx, kv_idx in (mask != wanted).nonzero().tolist()[:1]:
        message = f"the row of slot {q_idx} {how}"
        yield Fault(message, case, layout, mask, q_idx, kv_idx)
