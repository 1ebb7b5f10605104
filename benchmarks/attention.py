"""Measures attention alone: prefill under a mask of five isolated segments, and a decode step.

Every way computes the same layer (24 query heads over 8 key heads of 128, bf16) in one run,
captured as a CUDA graph so that launch overhead on the host does not count. TFLOP/s count the
pairs that the mask allows, or for causal peers the pairs before each query, not the tiles. The
floor of prefill is the time of these pairs at the rate of a large matrix product; that of decode
is the time to read keys and values once. Both rates are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexmask import create_block_mask, explain_mask
from flexmask.attention.flex_call import TRITON_OPTIONS
from flexmask.attention.model_probe import AttentionShape
from flexmask.bench.machine import matrix_rate, read_bandwidth
from flexmask.device_clock import time_call
from flexmask.engine.prefill_kernel import Tile, flash_can_attend
from flexmask.kernels.decode_attention import decode_attention
from flexmask.torch_internals import mark_static
from stamp import environment_stamp

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import FlexKernelOptions

HEADS, KV_HEADS, DIM = 24, 8, 128
SEGMENTS, TAIL = 5, 128
TILE = (128, 128)
LONGEST_DENSE = 16_384
PREFILL_CASES = ["64x1280", "1x4096", "1x16384", "1x65536"]
DECODE_CASES = ["1x1024", "1x16384", "8x1024", "64x1024"]


@dataclass(frozen=True)
class Timing:
    """Results for one way.

    Attributes:
        case: Phase, rows and tokens.
        way: The implementation that ran.
        ms: Median milliseconds per call.
        tflops: 10¹² operations per second on the counted pairs; None for decode.
        relative_error: Error against attention in float32 with the dense mask; None if that mask
            is too large.
    """

    case: str
    way: str
    ms: float
    tflops: float | None
    relative_error: float | None


def graph_ms(call: Callable[[], object]) -> float:
    """Return the median milliseconds of ``call`` on the device, without launch overhead."""
    return time_call(call, torch.device("cuda"), repeats=10).median


def segments_mask(length: int) -> Callable[..., Tensor]:
    """Return the mask of a prefix that all see, isolated segments, and a tail that sees all."""
    prefix = length // 16
    segment = torch.full((length,), SEGMENTS + 1, dtype=torch.int32)
    body = torch.arange(length - TAIL - prefix) * SEGMENTS // (length - TAIL - prefix) + 1
    segment[: length - TAIL] = torch.cat((torch.zeros(prefix, dtype=torch.int64), body)).int()
    segment = segment.cuda()
    mark_static(segment)  # FLASH does not take captured tensors of symbolic size

    def five_segments(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = (segment[kv_idx] == 0) | (segment[q_idx] == segment[kv_idx])
        return (q_idx >= kv_idx) & (seen | (segment[q_idx] > SEGMENTS))

    return five_segments


def compiled_flex(options: dict[str, Any] | None, dynamic: bool) -> Callable[..., Tensor]:
    """Return FlexAttention with kernel options, not compiled yet."""
    kernel_options = cast("FlexKernelOptions | None", options)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
        return flex_attention(
            query, key, value, block_mask=mask, enable_gqa=True, kernel_options=kernel_options
        )

    return torch.compile(attend, dynamic=dynamic, fullgraph=True)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference divided by the norm of ``want``."""
    return float((got.float() - want).norm() / want.norm())


@dataclass(frozen=True)
class Way:
    """One way to compute a prefill.

    Attributes:
        name: Name of the implementation.
        pairs: Pairs that its TFLOP/s count: ``mask`` for allowed pairs, ``causal`` for all causal
            ones.
        call: Computes attention.
        order: The query that each row of the result belongs to, ``(Q,)``; None if not reordered.
    """

    name: str
    pairs: str
    call: Callable[[], Tensor]
    order: Tensor | None = None


@dataclass(frozen=True)
class Prefill:
    """Queries, keys and values, ``(B, H, length, D)`` each, and their mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    length: int
    mask_mod: Callable[..., Tensor]

    @classmethod
    def random(cls, rows: int, length: int) -> Prefill:
        """Make random queries, keys and values."""
        torch.manual_seed(0)
        shapes = [(rows, heads, length, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        query, key, value = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
        return cls(query, key, value, length, segments_mask(length))

    def causal_ways(self) -> list[Way]:
        """Return the causal peers, which compute every pair before a query."""

        def causal() -> Tensor:
            inputs = (self.query, self.key, self.value)
            return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

        def cudnn() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return causal()

        return [Way("SDPA causal", "causal", causal), Way("SDPA causal, cuDNN", "causal", cudnn)]

    def flex_way(self) -> Way:
        """Return FlexAttention with torch's default options."""
        mask = create_block_mask(self.mask_mod, None, None, self.length, self.length, "cuda", TILE)
        attend = compiled_flex(None, dynamic=False)
        return Way(
            "flex_attention", "mask", lambda: attend(self.query, self.key, self.value, mask)
        )

    def flexmask_ways(self) -> list[Way]:
        """Return Triton's kernel with each tile size, and FLASH if it is installed."""
        ways = [
            self._flexmask_way(f"Triton, {tile[0]}x{tile[1]}", {"IS_DIVISIBLE": True} | own, tile)
            for tile, own in TRITON_OPTIONS.items()
        ]
        shape = AttentionShape(KV_HEADS, DIM, DIM, has_softcap=False)
        if flash_can_attend(shape, self.query.dtype, self.query.device):
            ways.append(self._flexmask_way("FLASH", {"BACKEND": "FLASH"}, TILE))
        return ways

    def _flexmask_way(self, kernel: str, options: dict[str, Any], tile: Tile) -> Way:
        """Return a kernel of flexmask, with queries reordered as in the engine."""
        length = self.length
        order = torch.arange(length).view(-1, tile[0]).flip(0).flatten().int().cuda()
        mark_static(order)

        def placed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self.mask_mod(b, h, order[q_idx], kv_idx)

        mask = create_block_mask(placed, None, None, length, length, "cuda", tile)
        attend, queries = compiled_flex(options, dynamic=True), self.query[:, :, order]
        return Way(
            f"flexmask {kernel}",
            "mask",
            lambda: attend(queries, self.key, self.value, mask),
            order,
        )

    def dense_way(self) -> tuple[Way, Tensor]:
        """Return SDPA with the dense mask, and its result in float32."""
        index = torch.arange(self.length, device="cuda")
        dense = self.mask_mod(None, None, index[:, None], index[None])
        key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (self.key, self.value))
        want = F.scaled_dot_product_attention(
            self.query.float(), key.float(), value.float(), attn_mask=dense
        )

        def call() -> Tensor:
            return F.scaled_dot_product_attention(self.query, key, value, attn_mask=dense)

        return Way("SDPA, dense mask", "mask", call), want


def prefill_timings(rows: int, length: int, flops_per_s: float) -> list[Timing]:
    """Time all ways for ``rows`` prompts of ``length`` tokens, and compute the floor."""
    prefill = Prefill.random(rows, length)
    report = explain_mask(prefill.mask_mod, None, None, length, length, "cuda")
    pairs = {"mask": report.density * length**2, "causal": length * (length + 1) / 2}
    flops = {kind: 4 * count * DIM * HEADS * rows for kind, count in pairs.items()}
    ways = [*prefill.causal_ways(), prefill.flex_way(), *prefill.flexmask_ways()]
    want = None
    if length <= LONGEST_DENSE and rows == 1:
        dense, want = prefill.dense_way()
        ways.append(dense)
    case, floor_ms = f"prefill {rows}x{length}", flops["mask"] / flops_per_s * 1e3
    timings = [Timing(case, "floor", floor_ms, flops_per_s / 1e12, None)]
    print_row(timings[0])
    for way in ways:
        torch.compiler.reset()
        output, ms = way.call(), graph_ms(way.call)
        error = None
        if want is not None and way.pairs == "mask":
            # The order is its own inverse.
            error = relative_error(output if way.order is None else output[:, :, way.order], want)
        timings.append(Timing(case, way.name, ms, flops[way.pairs] / ms / 1e9, error))
        print_row(timings[-1])
    return timings


def decode_timings(rows: int, length: int, bandwidth: float) -> list[Timing]:
    """Time all ways to attend from one token to ``length`` keys, and compute the floor."""
    torch.manual_seed(0)
    query = torch.randn(rows, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, rows, KV_HEADS, length, DIM, device="cuda", dtype=torch.bfloat16)
    slots = torch.full((rows,), length - 1, device="cuda")
    every = create_block_mask(lambda b, h, q, kv: kv >= 0, None, None, 1, length, "cuda")
    attend = compiled_flex(None, dynamic=False)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    def own() -> Tensor:
        last = (query[:, :, 0], key[:, :, -1], value[:, :, -1])
        rows: Tensor = decode_attention(*last, None, None, key, value, slots, DIM**-0.5, 0.0)
        return rows[:, :, None]

    ways = {
        "SDPA": sdpa,
        "flex_attention": lambda: attend(query, key, value, every),
        "flexmask decode_attention": own,
    }
    want = F.scaled_dot_product_attention(
        query.float(), *[x.repeat_interleave(HEADS // KV_HEADS, 1).float() for x in (key, value)]
    )
    case = f"decode {rows}x{length}"
    floor_ms = (key.nbytes + value.nbytes) / bandwidth * 1e3
    timings = [Timing(case, "floor", floor_ms, None, None)]
    for way, call in ways.items():
        error = relative_error(call(), want)
        timings.append(Timing(case, way, graph_ms(call), None, error))
    for timing in timings:
        print_row(timing)
    return timings


def print_row(timing: Timing) -> None:
    """Print one result as a line of the table."""
    tflops = "" if timing.tflops is None else f"{timing.tflops:9.0f}"
    error = "" if timing.relative_error is None else f"{timing.relative_error:10.1e}"
    print(f"{timing.case:18} {timing.way:26} {timing.ms:9.4f} {tflops:>9} {error:>10}", flush=True)


@torch.no_grad()
def main() -> None:
    """Print a table, then a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefill", nargs="*", default=PREFILL_CASES)
    parser.add_argument("--decode", nargs="*", default=DECODE_CASES)
    arguments = parser.parse_args()
    bandwidth = read_bandwidth(torch.device("cuda"))
    flops_per_s = matrix_rate(torch.device("cuda"), torch.bfloat16)
    torch.cuda.empty_cache()
    print(f"{'case':18} {'way':26} {'ms':>9} {'TFLOP/s':>9} {'rel. error':>10}")
    timings = []
    for case in arguments.prefill:
        rows, length = map(int, case.split("x"))
        timings += prefill_timings(rows, length, flops_per_s)
        torch.cuda.empty_cache()
    for case in arguments.decode:
        rows, length = map(int, case.split("x"))
        timings += decode_timings(rows, length, bandwidth)
    record = {
        "read_bytes_per_s": bandwidth,
        "flops_per_s": flops_per_s,
        "results": [asdict(timing) for timing in timings],
        "environment": environment_stamp(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
