"""The plan of a prefill, made on the host while the device computes something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flexmask.engine.stream_inputs import StreamInputs
from flexmask.kernels.decode_attention import KeyTable
from flexmask.layout_batch import LayoutTables

DecodeKernel = Literal["flex_attention", "decode_attention"]


@dataclass(frozen=True)
class PrefillPlan:
    """The plan of a prefill of new prompts in some batch rows. All tensors are on the CPU.

    `flexmask.engine.prefill_planner.PrefillPlanner` makes it.

    Attributes:
        rows: The batch rows.
        counts: Prompt tokens of each row whose keys and values are needed: all but the last.
        tables: Segment ids and positions of these rows.
        inputs: The tokens to compute, as one stream; None if all are copied.
        copied_slots: ``(N, P)`` slots that the cached prefix is copied to, counted over the slots
            of all rows; None without copies.
        stale_slots: ``(N,)`` slots behind the prompts that kernels load and mask. They are
            cleared, because a NaN there would count in spite of its weight of zero.
        decode_kernels: The kernel that can decode these rows, by kind of layer.
        key_table: Slots of the keys of each row; None if decoding does not use a table.
        computed_tokens: Tokens to compute.
        copied_tokens: Tokens whose keys and values are copied.
    """

    rows: tuple[int, ...]
    counts: tuple[int, ...]
    tables: LayoutTables
    inputs: StreamInputs | None
    copied_slots: Tensor | None
    stale_slots: Tensor
    decode_kernels: Mapping[str, DecodeKernel]
    key_table: KeyTable | None
    computed_tokens: int
    copied_tokens: int
