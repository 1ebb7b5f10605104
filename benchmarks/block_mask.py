"""Measures time and memory of building a BlockMask, with torch's builders and flexmask's.

Every case runs in a process of its own, so that first-call time and peak memory are its own, and
is stopped at the time limit. Results are compared with torch's: all tiles if torch can build the
mask, otherwise three rows of tiles, which torch builds as masks of 128 queries.

    python benchmarks/block_mask.py                  # on CPU, about five minutes
    python benchmarks/block_mask.py --device cuda    # torch compiled too
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import create_block_mask as torch_create_block_mask

from flexmask.block_mask import DecodeRowMask, create_block_mask
from stamp import environment_stamp

TILE = 128
EAGER_BYTES_PER_PAIR = 11
LENGTHS = {"cpu": (32_768, 131_072, 1_048_576), "cuda": (16_384, 131_072, 1_048_576)}
COMPILED_LENGTHS = {"cpu": (), "cuda": (16_384, 131_072)}
DECODE_LENGTH = 131_072
WARM_S = 3.0
"""Seconds for which a case repeats its call."""


@dataclass(frozen=True)
class Case:
    """A case: the builder, mask, length and device that one process measures."""

    builder: str
    mask: str
    length: int
    device: str


@dataclass(frozen=True)
class Result:
    """Results for one case.

    Attributes:
        status: "ok", or the reason why there is no figure.
        first_ms: Time of the first call of the process, including compilation.
        median_ms: Median time of later synchronised calls; in a CUDA graph for decode rows.
        fastest_ms: Fastest later call.
        slowest_ms: Slowest later call.
        peak_bytes: Peak memory above that before the call, including the BlockMask.
        mask_bytes: Size of the BlockMask.
        is_exact: Whether three rows of tiles equal torch's.
        digest: Digest of all listed tiles.
    """

    case: Case
    status: str
    first_ms: float | None = None
    median_ms: float | None = None
    fastest_ms: float | None = None
    slowest_ms: float | None = None
    peak_bytes: int | None = None
    mask_bytes: int | None = None
    is_exact: bool | None = None
    digest: str | None = None


# Masks.


def causal(length: int, device: str) -> Callable[..., Tensor]:
    """Each token sees itself and the tokens before it."""
    return lambda b, h, q_idx, kv_idx: q_idx >= kv_idx


def ensemble(length: int, device: str) -> Callable[..., Tensor]:
    """Five isolated segments after a shared prefix, and a tail that sees everything."""
    prefix, tail, count = length // 16, 128, 5
    segment_ids = torch.zeros(length, dtype=torch.int32)
    size = (length - prefix - tail) // count
    for segment in range(count):
        start = prefix + segment * size
        segment_ids[start : start + size] = segment + 1
    segment_ids[prefix + count * size :] = 99
    segment_ids = segment_ids.to(device)

    def ensemble(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q_segment, kv_segment = segment_ids[q_idx], segment_ids[kv_idx]
        sees = (kv_segment == 0) | (q_segment == kv_segment) | (q_segment == 99)
        return (q_idx >= kv_idx) & sees

    return ensemble


def documents(length: int, device: str) -> Callable[..., Tensor]:
    """64 packed documents of random lengths."""
    cuts = torch.randperm(length - 1, generator=torch.Generator().manual_seed(0))[:63] + 1
    starts = torch.zeros(length, dtype=torch.int32)
    starts[cuts] = 1
    document_ids = starts.cumsum(0, dtype=torch.int32).to(device)

    def documents(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (document_ids[q_idx] == document_ids[kv_idx]) & (q_idx >= kv_idx)

    return documents


MASKS = {"causal": causal, "ensemble of 5": ensemble, "64 documents": documents}


# Builders.


def build(case: Case, mask_mod: Callable[..., Tensor]) -> BlockMask:
    """Build the mask of a case."""
    length, device = case.length, case.device
    if case.builder == "flexmask":
        return create_block_mask(mask_mod, None, None, length, length, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiles = case.builder == "torch compiled"
        return torch_create_block_mask(
            mask_mod, None, None, length, length, device, _compile=compiles
        )


def digest(block_mask: BlockMask) -> str:
    """Hash the part of a BlockMask that kernels read: the listed tiles of each row."""
    sha = hashlib.sha256()
    lists = [
        (block_mask.kv_num_blocks, block_mask.kv_indices),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ]
    for counts, indices in lists:
        assert counts is not None
        assert indices is not None
        counts, indices = counts.cpu(), indices.cpu()
        columns = torch.arange(indices.shape[-1], dtype=torch.int32)
        sha.update(counts.numpy().tobytes())
        for row, count in zip(indices.flatten(0, 2), counts.flatten(), strict=True):
            sha.update(row[columns < count].numpy().tobytes())
    return sha.hexdigest()


def rows_are_exact(block_mask: BlockMask, mask_mod: Callable[..., Tensor], length: int) -> bool:
    """Compare the first, a middle and the last row of tiles with masks that torch builds."""
    device = block_mask.kv_indices.device
    rows = block_mask.kv_indices.shape[2]
    for row in (0, rows * 5 // 8, rows - 1):
        start = torch.tensor(row * TILE, device=device)
        strip = torch_create_block_mask(_shifted(mask_mod, start), 1, 1, TILE, length, str(device))
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
            if not torch.equal(
                getattr(block_mask, name)[:, :, row], getattr(strip, name)[:, :, 0]
            ):
                return False
    return True


def _shifted(mask_mod: Callable[..., Tensor], start: Tensor) -> Callable[..., Tensor]:
    return lambda b, h, q_idx, kv_idx: mask_mod(b, h, q_idx + start, kv_idx)


# Measurement, in the process of a case.


def timed_ms(call: Callable[[], Any], device: str) -> float:
    """Time a call, including its work on the device, in milliseconds."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - started) * 1e3


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """Return the peak memory so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def repeated_ms(call: Callable[[], Any], device: str, repeats: int) -> list[float]:
    """Time a call repeatedly for `WARM_S` seconds, at least once."""
    times: list[float] = []
    stop = time.perf_counter() + WARM_S
    while not times or (len(times) < repeats and time.perf_counter() < stop):
        times.append(timed_ms(call, device))
    return times


def measure_builder(case: Case, repeats: int) -> Result:
    """Measure the building of a mask."""
    if case.builder == "torch eager" and not has_memory(case):
        return Result(case, "needs more memory than there is")
    mask_mod = MASKS[case.mask](case.length, case.device)
    synchronize(case.device)
    before = peak_bytes(case.device)
    built: list[BlockMask] = []
    first_ms = timed_ms(lambda: built.append(build(case, mask_mod)), case.device)
    peak = peak_bytes(case.device) - before
    block_mask = built.pop()
    tensors = (x for x in block_mask.as_tuple() if isinstance(x, Tensor))
    mask_bytes = sum(x.numel() * x.element_size() for x in tensors)
    times = repeated_ms(lambda: build(case, mask_mod), case.device, repeats)
    return Result(
        case,
        "ok",
        first_ms,
        statistics.median(times),
        min(times),
        max(times),
        peak,
        mask_bytes,
        rows_are_exact(block_mask, mask_mod, case.length),
        digest(block_mask),
    )


def measure_decode_rows(case: Case, repeats: int) -> Result:
    """Measure the update of a decode row; on CUDA within a CUDA graph."""
    mask_mod = MASKS[case.mask](case.length, case.device)
    started = time.perf_counter()
    rows = DecodeRowMask(mask_mod, 1, case.length, case.device)
    synchronize(case.device)
    first_ms = (time.perf_counter() - started) * 1e3
    slot = torch.tensor([case.length - 1], device=case.device)
    is_exact = decode_rows_are_exact(rows, mask_mod, slot)
    if case.device == "cuda":
        times = graph_ms(lambda: rows.update(slot), repeats)
    else:
        times = repeated_ms(lambda: rows.update(slot), case.device, repeats)
    return Result(
        case,
        "ok",
        first_ms,
        statistics.median(times),
        min(times),
        max(times),
        is_exact=is_exact,
    )


def graph_ms(call: Callable[[], Any], repeats: int) -> list[float]:
    """Time a call within a CUDA graph that contains it 20 times."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            call()
    return [timed_ms(graph.replay, "cuda") / 20 for _ in range(repeats + 3)][3:]


def decode_rows_are_exact(
    rows: DecodeRowMask, mask_mod: Callable[..., Tensor], slot: Tensor
) -> bool:
    """Compare the listed tiles with those of torch's mask of one query, full or partial."""
    rows.update(slot)
    at_slot = _shifted(mask_mod, slot[0])
    length = rows.block_mask.seq_lengths[1]
    expected = torch_create_block_mask(at_slot, 1, 1, 1, length, str(slot.device))
    listed: list[int] = []
    mask = rows.block_mask
    for counts, indices in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert counts is not None
        assert indices is not None
        listed += indices.flatten()[: int(counts)].tolist()
    return sorted(listed) == expected.kv_indices.flatten()[: int(expected.kv_num_blocks)].tolist()


def has_memory(case: Case) -> bool:
    """Return True if there may be enough memory for torch's eager builder."""
    if case.device == "cuda":
        available, _ = torch.cuda.mem_get_info()
    else:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return case.length**2 * EAGER_BYTES_PER_PAIR < available


# The program that starts them.


def run(case: Case, repeats: int, time_limit_s: float) -> Result:
    """Measure a case in a process of its own."""
    command = [sys.executable, __file__, "--repeats", str(repeats), "--case"]
    try:
        finished = subprocess.run(
            [*command, json.dumps(asdict(case))],
            capture_output=True,
            text=True,
            timeout=time_limit_s,
        )
    except subprocess.TimeoutExpired:
        return Result(case, f"over the limit of {time_limit_s:.0f} s")
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"]
        return Result(case, f"failed: {lines[-1][:200]}")
    return Result(**(json.loads(finished.stdout.splitlines()[-1]) | {"case": case}))


def cases(arguments: argparse.Namespace) -> list[Case]:
    """List the cases to measure."""
    device = arguments.device
    lengths = arguments.lengths or LENGTHS[device]
    compiled = COMPILED_LENGTHS[device] if arguments.compiled is None else arguments.compiled
    found = []
    for length in lengths:
        for mask in arguments.masks:
            found.append(Case("torch eager", mask, length, device))
            if length in compiled:
                found.append(Case("torch compiled", mask, length, device))
            found.append(Case("flexmask", mask, length, device))
    return [*found, Case("decode row", "ensemble of 5", DECODE_LENGTH, device)]


def row(result: Result, agrees: str) -> str:
    """Format a result as a line of the table."""
    case = result.case
    line = f"{case.length:>9,}  {case.mask:<14} {case.builder:<15}"
    if result.status != "ok":
        return f"{line} {result.status}"
    line += f" {result.first_ms:>10.2f} {result.median_ms:>10.3f}"
    line += f" {result.fastest_ms:>9.3f}–{result.slowest_ms:<9.3f}"
    if result.peak_bytes is None or result.mask_bytes is None:
        return f"{line} {'':>9} {'':>9}  {agrees}"
    above = max(0, result.peak_bytes - result.mask_bytes)
    return f"{line} {result.mask_bytes / 2**20:>9.1f} {above / 2**20:>9.1f}  {agrees}"


def agreement(result: Result, results: list[Result]) -> str:
    """Describe how a result agrees with torch's."""
    if not result.is_exact:
        return "DIFFERS from torch"
    twins = [
        other
        for other in results
        if other.case.mask == result.case.mask
        and other.case.length == result.case.length
        and other.case.builder.startswith("torch")
        and other.digest is not None
    ]
    if result.digest is None or not twins:
        return "equal in 3 rows" if result.digest else "equal"
    return "equal" if all(t.digest == result.digest for t in twins) else "DIFFERS from torch"


def main() -> None:
    """Print progress, a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", help="queries and keys")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS)[1:])
    parser.add_argument(
        "--compiled", type=int, nargs="*", help="lengths at which torch's builder is compiled too"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--time-limit", type=float, default=150, help="seconds per case")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        case = Case(**arguments.case)
        measure = measure_decode_rows if case.builder == "decode row" else measure_builder
        print(json.dumps(asdict(measure(case, arguments.repeats))))
        return
    results = []
    for case in cases(arguments):
        print(f"{case.builder}, {case.mask}, {case.length:,} …", file=sys.stderr, flush=True)
        results.append(run(case, arguments.repeats, arguments.time_limit))
    print(f"{'':41} {'ms':>10} {'ms':>10} {'ms':^19} {'MiB':>9} {'MiB':>9}")
    print(
        f"{'length':>9}  {'mask':<14} {'builder':<15} {'first':>10} {'median':>10} {'spread':^19}"
        f" {'mask':>9} {'above it':>9}  torch's tiles"
    )
    for result in results:
        print(row(result, agreement(result, results)))
    environment = environment_stamp()
    print(json.dumps({"results": [asdict(r) for r in results], "environment": environment}))


if __name__ == "__main__":
    main()
