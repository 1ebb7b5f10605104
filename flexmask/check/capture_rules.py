"""Rules about what a mask_mod captures, and about attention compiled with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flexmask.block_mask.intervals.legality import captured_name, captured_values, mask_name
from flexmask.check.cases import SAME_SHAPE, SMALL
from flexmask.check.checked_strategy import Subject, capacity_for, loaded_batch
from flexmask.check.finding import Fault
from flexmask.check.torch_settings import restore_settings
from flexmask.error_text import innermost_place, place_of_fault
from flexmask.errors import MaskError
from flexmask.torch_internals import tree_leaves

if TYPE_CHECKING:
    from flexmask.check.compiled_run import CompiledRun
    from flexmask.mod_types import MaskMod

OTHER_DEVICE = torch.device("meta")
"""A device that every machine has; its tensors have shapes and no values."""


class _DeviceMode(TorchFunctionMode):
    """Refuses tensors of another device; torch does not refuse them on `OTHER_DEVICE`."""

    def __init__(self, mask_mod: MaskMod) -> None:
        super().__init__()
        self._mask_mod = mask_mod

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.device != OTHER_DEVICE:
                name = captured_name(self._mask_mod, leaf)
                raise MaskError(
                    f"{mask_name(self._mask_mod)} captures {name} on {leaf.device}, while its "
                    "batch is on another device"
                )
        return func(*args, **(kwargs or {}))


def moves_to_another_device(subject: Subject) -> Iterator[Fault]:
    """Built for a batch on another device, the mask_mod uses only tensors of that device."""
    layout = subject.layout(SMALL[2])
    batch = loaded_batch([layout], [0], OTHER_DEVICE)
    try:
        mask_mod = subject.strategy.mask_mod(batch)
    except (NotImplementedError, RuntimeError) as error:
        place = place_of_fault(error, subject.source_file) or innermost_place(error)
        yield Fault(
            f"building the mask reads values of the batch, or mixes devices, at {place} "
            f"({type(error).__name__})"
        )
        return
    index = torch.zeros(
        1, dtype=torch.long, device=OTHER_DEVICE
    )  # the value of a 0-d index would be read
    with _DeviceMode(mask_mod):
        mask_mod(index, index, index, index)


def leaves_torch_alone(subject: Subject) -> Iterator[Fault]:
    """Making layouts and masks changes no global setting of torch."""
    for change in restore_settings(subject.settings):
        yield Fault(f"it sets {change}")


def captures_no_changing_number(subject: Subject) -> Iterator[Fault]:
    """Python numbers that the mask_mod captures are the same for every layout."""
    numbers = []
    for case in SAME_SHAPE:
        batch = loaded_batch([subject.layout(case)], [0])
        mask_mod = subject.strategy.mask_mod(batch)
        captured = captured_values(mask_mod, depth=4)
        numbers.append([(name, x) for name, x in captured if isinstance(x, int | float)])
    for same in zip(*numbers, strict=False):
        if len(set(same)) > 1:
            shown = ", then ".join(str(value) for _, value in same)
            yield Fault(
                f"{mask_name(mask_mod)} captures the Python number {same[0][0]!r}, which is "
                f"{shown} for layouts of one shape: attention is compiled again for each"
            )


def captures_nothing_as_long_as_the_batch(subject: Subject) -> Iterator[Fault]:
    """Tensors that the mask_mod captures, except the batch's, do not grow with the batch."""
    layout = subject.layout(SMALL[2])
    shapes = []
    for num_slots in (len(layout), 2 * capacity_for(len(layout))):
        batch = loaded_batch([layout], [num_slots - len(layout)])
        mask_mod = subject.strategy.mask_mod(batch)
        own = set(map(id, batch.buffers))
        captured = captured_values(mask_mod, depth=4)
        shapes.append(
            {n: tuple(x.shape) for n, x in captured if isinstance(x, Tensor) and id(x) not in own}
        )
    for name, shape in shapes[0].items():
        longer = shapes[1].get(name, shape)
        if longer != shape:
            yield Fault(
                f"{mask_name(mask_mod)} captures tensor {name!r}, whose shape follows the "
                f"batch: {shape}, then {longer}; attention is compiled again for each, or not "
                "at all"
            )


def attends_as_dense_attention_does(subject: Subject) -> Iterator[Fault]:
    """Compiled FlexAttention under the mask equals SDPA with the dense mask."""
    run = _compiled_run(subject)
    if run.error:
        yield Fault(f"attention under the mask does not compile: {run.error}", run.cases[0])
    for case, error in zip(run.cases, run.errors, strict=False):
        if not error <= run.tolerance:  # NaN differs too
            yield Fault(f"attention differs from dense attention by {error:.2g}", case)


def _compiled_run(subject: Subject) -> CompiledRun:
    """Run attention under the strategy's mask, which takes seconds; two rules use the result."""
    from flexmask.check.compiled_run import run_compiled

    return subject.once(run_compiled)


def compiles_once(subject: Subject) -> Iterator[Fault]:
    """Attention compiles for the first layout, and not again for others."""
    run = _compiled_run(subject)
    for case, graphs in list(zip(run.cases, run.graphs, strict=False))[1:]:
        if graphs:
            yield Fault("attention is compiled again for another layout", case)
