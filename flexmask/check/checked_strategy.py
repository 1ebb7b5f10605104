"""The strategy under check, with its layouts and masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from flexmask.block_mask.intervals.pairs_by_vmap import PairsByVmap
from flexmask.check.cases import Case
from flexmask.check.torch_settings import read_settings
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.mod_types import MaskMod

CPU = torch.device("cpu")

T = TypeVar("T")

MIN_CAPACITY = 64


def capacity_for(num_slots: int) -> int:
    """Return the capacity of a row for ``num_slots``: a power of two."""
    return max(MIN_CAPACITY, 1 << (num_slots - 1).bit_length())


def loaded_batch(
    layouts: Sequence[Layout], starts: Sequence[int], device: torch.device = CPU
) -> LayoutBatch:
    """Return a batch that holds all tokens of each layout, from its start slot on."""
    ends = [start + len(layout) for start, layout in zip(starts, layouts, strict=True)]
    batch = LayoutBatch(len(layouts), capacity_for(max(ends)), device)
    batch.load(layouts, [len(layout) for layout in layouts], starts)
    return batch


def evaluate(mask_mod: MaskMod, row: int, q_slots: Tensor, kv_slots: Tensor) -> Tensor:
    """Evaluate a mask_mod exactly, ``(Q, K)`` bool, as torch's ``create_block_mask`` does.

    Raises:
        MaskError: If it breaks a rule of FlexAttention.
    """
    b, h = torch.tensor([row]), torch.tensor([0])
    pairs = PairsByVmap(mask_mod, pointwise_only=True)
    return pairs(b, h, q_slots[None], kv_slots[None])[0][0]


class Subject:
    """A strategy under check; each of its layouts and masks is computed once.

    Attributes:
        settings: torch's global settings before the strategy ran.
        case: The request whose layout was computed last; an exception belongs to it.
    """

    def __init__(self, strategy: Strategy) -> None:
        """Read torch's settings; layouts and masks are computed when a rule needs them."""
        self.strategy = strategy
        self.settings = read_settings()
        self.case: Case | None = None
        self.mask = functools.cache(self._mask)
        self._layouts: dict[Case, Layout] = {}
        self._computed: dict[object, object] = {}

    def layout(self, case: Case) -> Layout:
        """Return the strategy's layout of a request."""
        self.case = case
        if case not in self._layouts:
            self._layouts[case] = self.strategy.layout(case.request())
        return self._layouts[case]

    def _mask(self, case: Case) -> Tensor:
        """Return the mask of a layout that is alone in a batch, at slot 0: ``(S, S)`` bool."""
        layout = self.layout(case)
        return self.mask_in(loaded_batch([layout], [0]), 0, 0, len(layout))

    def mask_in(self, batch: LayoutBatch, row: int, start: int, size: int) -> Tensor:
        """Return the mask of ``size`` slots of a batch row: ``(size, size)`` bool."""
        slots = torch.arange(start, start + size)
        return evaluate(self.strategy.mask_mod(batch), row, slots, slots)

    @cached_property
    def source_file(self) -> str:
        """The file that defines the strategy's mask_mod."""
        return self.strategy.source().rpartition(":")[0]

    def once(self, compute: Callable[[Subject], T]) -> T:
        """Return ``compute(self)``, which is computed once and then kept."""
        if compute not in self._computed:
            self._computed[compute] = compute(self)
        return cast(T, self._computed[compute])
