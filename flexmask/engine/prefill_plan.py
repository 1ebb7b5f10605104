"""The plan of a prefill, made on the host while the device computes something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flexmask.engine.stream_inputs import StreamInputs
from flexmask.kernels.decode_attention import KeyTable
from flexmask.kv_store.span_values import LayerGroupValues
from flexmask.layout_batch import LayoutTables

DecodeKernel = Literal["flex_attention", "decode_attention"]


@dataclass(frozen=True)
class SpanCopy:
    """Keys and values that are copied to some places.

    Attributes:
        values: Those of ``P`` tokens, on the device.
        first_slots: The first slot of each place, counted over the slots of all rows.
        old_position: Position of the first token where its keys were computed.
        new_position: Its position in these places.
    """

    values: tuple[LayerGroupValues, ...]
    first_slots: tuple[int, ...]
    old_position: int
    new_position: int


@dataclass(frozen=True)
class KeptSpan:
    """A span whose keys and values the store gets once they are there.

    Attributes:
        identity: Its identity, 32 bytes.
        first_slot: Its first slot, counted over the slots of all rows.
        length: Its number of tokens.
        first_position: Position of its first token.
    """

    identity: bytes
    first_slot: int
    length: int
    first_position: int


@dataclass(frozen=True)
class PrefillPlan:
    """The plan of a prefill of new prompts in some batch rows.

    All tensors are on the CPU, but those of `copies`.

    `flexmask.engine.prefill_planner.PrefillPlanner` makes it.

    Attributes:
        rows: The batch rows.
        counts: Prompt tokens of each row whose keys and values are needed: all but the last.
        tables: Segment ids and positions of these rows.
        inputs: The tokens to compute, as one stream; None if all are copied.
        copies: Keys and values that are copied.
        kept: Spans whose keys and values the store gets afterwards.
        stale_slots: ``(N,)`` slots behind the prompts that kernels load and mask. They are
            cleared, because a NaN there would count in spite of its weight of zero.
        decode_kernels: The kernel that can decode these rows, by kind of layer.
        key_table: Slots of the keys of each row; None if decoding does not use a table.
        computed_tokens: Tokens to compute.
        copied_tokens: Tokens whose keys and values are copied, or computed once for several.
        cached_spans: Spans whose keys and values the store had.
    """

    rows: tuple[int, ...]
    counts: tuple[int, ...]
    tables: LayoutTables
    inputs: StreamInputs | None
    copies: tuple[SpanCopy, ...]
    kept: tuple[KeptSpan, ...]
    stale_slots: Tensor
    decode_kernels: Mapping[str, DecodeKernel]
    key_table: KeyTable | None
    computed_tokens: int
    copied_tokens: int
    cached_spans: int = 0

    @property
    def work(self) -> dict[str, int]:
        """Counts by the names of `RunStats`, but for copied tokens."""
        return {
            "computed_tokens": self.computed_tokens,
            "cached_spans": self.cached_spans,
            "kept_spans": len(self.kept),
        }
