"""Measures the effects of tiles, captures and changing numbers on the speed of a mask.

Compiled FlexAttention under one mask at a time, as in the engine's prefill. Tiles of the
BlockMask, its build time, attention time, and compilation for another layout are reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from flexmask.attention.backend import flexmask_attention
from flexmask.block_mask import MaskReport, explain_mask
from flexmask.layout import Layout, TokenizedRequest, shared_prefix_layout
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import (
    and_masks,
    causal,
    is_fusion_tail,
    is_prefix,
    or_masks,
    same_segment,
    within_window,
)
from flexmask.mod_types import MaskMod
from flexmask.torch_internals import compiled_graphs
from stamp import environment_stamp

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
SEGMENTS = 8

Factory = Callable[[LayoutBatch], MaskMod]


@dataclass(frozen=True)
class Measured:
    """Results for one mask.

    Attributes:
        density: Allowed pairs as a share of all.
        tiles_computed: Partial and full tiles, as a share of all.
        tiles_partial: Partial tiles, in which the mask is evaluated, as a share of all.
        build_ms: Time of the second build of the BlockMask.
        attention_ms: Time of the fastest call of compiled attention.
        median_ms: Time of the median call.
        recompiled_s: Seconds that the first call under the next layout compiled; 0 if nothing.
    """

    mask: str
    density: float
    tiles_computed: float
    tiles_partial: float
    build_ms: float
    attention_ms: float
    median_ms: float
    recompiled_s: float


def layout_of(length: int, boundary: int, interleaved: bool = False) -> Layout:
    """Return a layout of a prefix of 128 tokens, eight segments and a tail of 16 tokens.

    Args:
        length: Total number of tokens.
        boundary: Number of tokens by which the first segment is longer than an even share, and
            the last one shorter.
        interleaved: Whether the tokens of the segments alternate.
    """
    share, prefix, tail = (length - 144) // SEGMENTS, 128, 16
    sizes = [share] * SEGMENTS
    sizes[0] += boundary
    sizes[-1] += length - prefix - tail - share * SEGMENTS - boundary
    request = TokenizedRequest((1,) * prefix, tuple((1,) * n for n in sizes), (1,) * tail)
    layout = shared_prefix_layout(request, "sequential")
    if not interleaved:
        return layout
    turns = [slot % SEGMENTS + 1 for slot in range(length - prefix - tail)]
    segment_ids = (0,) * prefix + tuple(turns) + (-1,) * tail
    return Layout(layout.token_ids, segment_ids, layout.position_ids)


def isolated(batch: LayoutBatch) -> MaskMod:
    """Isolated segments after a shared prefix, fused by the tail."""
    visible = or_masks(same_segment(batch), is_prefix(batch), is_fusion_tail(batch))
    return and_masks(causal, visible)


def everything(batch: LayoutBatch) -> MaskMod:
    """No mask: every pair is allowed."""
    return lambda b, h, q_idx, kv_idx: q_idx >= 0


def window(batch: LayoutBatch) -> MaskMod:
    """A window of the last 512 positions, looked up in a table of positions."""
    return and_masks(causal, within_window(batch, 512))


def window_of_slots(batch: LayoutBatch) -> MaskMod:
    """A window of the last 512 slots, by arithmetic only."""
    return and_masks(causal, lambda b, h, q_idx, kv_idx: q_idx - kv_idx < 512)


def dilated(batch: LayoutBatch) -> MaskMod:
    """Every eighth token before the query."""
    return and_masks(causal, lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 8 == 0)


def dense_table(batch: LayoutBatch) -> MaskMod:
    """The isolation mask, looked up in a dense table of all pairs."""
    slots = torch.arange(batch.segment_ids.shape[1], device=batch.device)
    zero = slots.new_zeros(())
    table = batch.table(isolated(batch)(zero, zero, slots[:, None], slots[None, :]))
    return lambda b, h, q_idx, kv_idx: table[q_idx, kv_idx]


def window_as_number(batch: LayoutBatch) -> MaskMod:
    """A window as long as the first segment, as a Python number read from the batch."""
    size = int((batch.segment_ids == 1).sum())
    return and_masks(causal, lambda b, h, q_idx, kv_idx: q_idx - kv_idx < size)


def window_as_tensor(batch: LayoutBatch) -> MaskMod:
    """The same window as a 0-d tensor on the device."""
    size = (batch.segment_ids == 1).sum()
    return and_masks(causal, lambda b, h, q_idx, kv_idx: q_idx - kv_idx < size)


MASKS: dict[str, tuple[Factory, bool]] = {
    "everything": (everything, False),
    "causal": (lambda batch: causal, False),
    "window 512, arithmetic": (window_of_slots, False),
    "window 512, positions": (window, False),
    "8 segments, contiguous": (isolated, False),
    "8 segments, interleaved": (isolated, True),
    "8 segments, dense table": (dense_table, False),
    "every 8th token": (dilated, False),
    "window as a Python number": (window_as_number, False),
    "window as a 0-d tensor": (window_as_tensor, False),
}


class MaskRun:
    """Measures one mask on its own batch."""

    def __init__(self, name: str, length: int, device: torch.device) -> None:
        """Build the BlockMask and compile attention with it."""
        self.name, self.length = name, length
        self.factory, self.interleaved = MASKS[name]
        self.batch = LayoutBatch(1, length, device)
        self.inputs = random_inputs(length, device)
        self.explain(boundary=0)  # warm-up: the first build of a process loads modules
        self.report = self.explain(boundary=0)
        self.times_ms: list[float] = []
        self.attend_ms(self.report)

    def explain(self, boundary: int) -> MaskReport:
        """Load a layout and build its BlockMask."""
        layout = layout_of(self.length, boundary, self.interleaved)
        self.batch.load([layout], [self.length], [0])
        device, length = self.batch.device, self.length
        return explain_mask(self.factory(self.batch), 1, None, length, length, device)

    @torch.no_grad()
    def attend_ms(self, report: MaskReport) -> float:
        """Time one call of compiled attention, in milliseconds."""
        query, key, value = self.inputs
        synchronize(query.device)
        started = time.perf_counter()
        flexmask_attention(torch.nn.Module(), query, key, value, report.block_mask)
        synchronize(query.device)
        return (time.perf_counter() - started) * 1e3

    def measured(self) -> Measured:
        """Return the results, after a call under another layout to see what it compiles."""
        report = self.report
        other = self.explain(boundary=40)
        graphs = compiled_graphs()
        next_ms = self.attend_ms(other)
        has_compiled = compiled_graphs() > graphs
        tiles = report.tiles_empty + report.tiles_partial + report.tiles_full
        return Measured(
            mask=self.name,
            density=report.density,
            tiles_computed=(report.tiles_partial + report.tiles_full) / tiles,
            tiles_partial=report.tiles_partial / tiles,
            build_ms=report.build_ms,
            attention_ms=min(self.times_ms),
            median_ms=statistics.median(self.times_ms),
            recompiled_s=next_ms / 1e3 if has_compiled else 0.0,
        )


def random_inputs(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return random query, key and value, ``(1, H, length, D)`` each; bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def random(heads: int) -> Tensor:
        return torch.randn(1, heads, length, HEAD_DIM, device=device, dtype=dtype)

    return random(HEADS), random(KV_HEADS), random(KV_HEADS)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096, help="tokens")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # an empty compile cache
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        report(arguments.length, arguments.repeats, torch.device(arguments.device))


def report(length: int, repeats: int, device: torch.device) -> None:
    """Measure and print."""
    torch.manual_seed(0)
    runs = [MaskRun(name, length, device) for name in MASKS]
    for _ in range(repeats):  # alternately, so that other load on the machine affects all masks
        for run in runs:
            run.times_ms.append(run.attend_ms(run.report))
    print(f"{'mask':26}  pairs  tiles  partial  build ms  attention ms (median)  recompiled s")
    results = [run.measured() for run in runs]
    for result in results:
        print(
            f"{result.mask:26} {result.density:6.1%} {result.tiles_computed:6.1%} "
            f"{result.tiles_partial:8.1%} {result.build_ms:9.2f} {result.attention_ms:13.3f} "
            f"({result.median_ms:7.3f}) {result.recompiled_s:13.1f}"
        )
    shape = {"length": length, "heads": HEADS, "kv_heads": KV_HEADS, "dim": HEAD_DIM}
    record = {"shape": shape, "masks": [asdict(result) for result in results]}
    print(json.dumps(record | {"environment": environment_stamp()}))


if __name__ == "__main__":
    main()
