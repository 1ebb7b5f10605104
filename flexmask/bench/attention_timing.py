"""Times one call of attention over one prompt by several implementations, and the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from flexmask.attention.backend import dense_attention, flexmask_attention
from flexmask.attention.flex_call import PrefillKernel, has_triton_options
from flexmask.attention.model_probe import AttentionShape
from flexmask.attention.placement import RowPlacement
from flexmask.attention.scaled_part import place_part
from flexmask.bench.heads import Heads
from flexmask.bench.machine import matrix_rate, read_bandwidth
from flexmask.block_mask import MaskReport, create_block_mask, explain_mask
from flexmask.device_clock import Spread, time_call
from flexmask.engine.memory import free_bytes
from flexmask.engine.prefill_kernel import (
    BLOCK_SIZE,
    Tile,
    flash_can_attend,
    prefill_tile,
    whole_tiles,
)
from flexmask.errors import OptionError
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import strategy_mask
from flexmask.strategy import Strategy
from flexmask.torch_internals import compile_settings

LONGEST_DENSE = {"cuda": 16_384, "cpu": 4_096}
"""Longest prompt for which a dense mask is made, which has an element for each pair."""
CAUSAL = "SDPA, causal"
LONGEST_SCORES = 2_048
"""Longest prompt for which all scores are computed, for strategies that change scores."""

_LARGE_TENSORS = 6
"""Queries, the result, and keys and values as they are and once for each query head."""


@dataclass(frozen=True)
class Timing:
    """The measurement of one implementation.

    Attributes:
        way: Name of the implementation.
        ms: Milliseconds per call; None if it did not run.
        tflops: 10¹² operations per second, counting the pairs that its mask allows.
        relative_error: Norm of the difference from dense attention in float32, divided by the
            norm; None if the mask is another, or too large for dense attention.
        note: A remark, such as the reason why it did not run.
    """

    way: str
    ms: Spread | None = None
    tflops: float | None = None
    relative_error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Floor:
    """The lower bound of the time of a call on this device.

    Attributes:
        ms: The larger of `compute_ms` and `read_ms`.
        compute_ms: Time of the operations of allowed pairs, at the rate of matrix products.
        read_ms: Time to move queries, keys, values and the result once.
        flops_per_s: The measured rate of matrix products.
        bytes_per_s: The measured memory bandwidth.
    """

    ms: float
    compute_ms: float
    read_ms: float
    flops_per_s: float
    bytes_per_s: float


class AttentionBench:
    """Attention over one prompt under a strategy, to be timed.

    Attributes:
        length: Tokens of the prompt.
        report: The pairs that the mask allows, and its tiles.
    """

    def __init__(
        self,
        strategy: Strategy,
        layout: Layout,
        heads: Heads,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Prepare the mask and its report; nothing is compiled yet.

        Raises:
            OptionError: If memory does not suffice for queries, keys and values.
            MaskError: If the strategy's mask_mod breaks a rule of FlexAttention.
        """
        self.length = len(layout)
        _check_memory(self.length, heads, device, dtype)
        self._heads, self._device, self._dtype = heads, device, dtype
        self._kernel: PrefillKernel | None = "triton" if device.type == "cuda" else None
        capacity = whole_tiles(self.length, BLOCK_SIZE)
        batch = LayoutBatch(1, capacity, device)
        batch.load([layout], [self.length], [0])
        self._mask_mod = strategy_mask(strategy, batch)
        self._score_mod = strategy.applied_score_mod(batch)
        slots = torch.arange(capacity, device=device)[None]
        self._scaled_part = place_part(strategy.scaled_part(batch), RowPlacement(slots))
        self.report: MaskReport = explain_mask(
            self._mask_mod, 1, None, self.length, self.length, device
        )

    def figures(self) -> dict[str, Any]:
        """Return the configuration of the measurement, as JSON values."""
        return {
            "tokens": self.length,
            "heads": asdict(self._heads),
            "device": str(self._device),
            "dtype": str(self._dtype).removeprefix("torch."),
            "allowed_pairs": self.report.allowed_pairs,
            "density": self.report.density,
            "tiles_full": self.report.tiles_full,
            "tiles_partial": self.report.tiles_partial,
            "tiles_empty": self.report.tiles_empty,
        }

    @torch.no_grad()
    def timings(self) -> Iterator[Timing]:
        """Measure one implementation after another, peers first."""
        allowed, every = self.report.allowed_pairs, self.length * (self.length + 1) // 2
        if reason := self._no_dense_sdpa():
            yield Timing("SDPA, dense mask", note=f"not run: {reason}")
        else:
            yield self._timed("SDPA, dense mask", self._sdpa_dense(), allowed)
        yield self._timed(CAUSAL, self._sdpa_causal(), every, note="another mask")
        if self._scaled_part is not None:
            reason = "the strategy scales a part of the keys, which one call does not"
            yield Timing("flex_attention", note=f"not run: {reason}")
        else:
            yield self._timed("flex_attention", self._flex(), allowed)
        yield self._own_timing("flexmask", self._kernel)
        if self._can_flash():
            yield self._own_timing("flexmask, FLASH", "flash")

    def floor(self) -> Floor:
        """Measure the device, and derive the lower bound of the time of a call."""
        flops_per_s = matrix_rate(self._device, self._dtype)
        bytes_per_s = read_bandwidth(self._device)
        query, key, value = self._inputs
        compute_ms = 1e3 * self._flops(self.report.allowed_pairs) / flops_per_s
        read_ms = 1e3 * (2 * query.nbytes + key.nbytes + value.nbytes) / bytes_per_s
        return Floor(max(compute_ms, read_ms), compute_ms, read_ms, flops_per_s, bytes_per_s)

    def _own_timing(self, way: str, kernel: PrefillKernel | None) -> Timing:
        dim = self._heads.dim
        has_options = has_triton_options(self._dtype, dim, dim)
        tile = prefill_tile(kernel, self.length, has_options=has_options)
        slots = whole_tiles(self.length, max(tile))
        note = f"{slots:,} slots in tiles of {tile[0]}x{tile[1]}"
        call = self._flexmask(kernel, tile, slots)
        return self._timed(way, call, self.report.allowed_pairs, note)

    def _timed(self, way: str, call: Callable[[], Tensor], pairs: int, note: str = "") -> Timing:
        with compile_settings(self._device):
            output = call()[:, :, : self.length]
            ms = time_call(call, self._device)
        wanted = None if way == CAUSAL else self._wanted
        error = None if wanted is None else _relative_error(output, wanted)
        return Timing(way, ms, self._flops(pairs) / ms.median / 1e9, error, note)

    def _flops(self, pairs: int) -> int:
        """Return the operations: two multiply-adds for each pair, head and dimension."""
        return 4 * pairs * self._heads.dim * self._heads.query

    @cached_property
    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def random(heads: int) -> Tensor:
            shape = (1, heads, self.length, self._heads.dim)
            return torch.randn(shape, generator=generator).to(self._device, self._dtype)

        return random(self._heads.query), random(self._heads.key), random(self._heads.key)

    @cached_property
    def _dense_mask(self) -> Tensor:
        slots = torch.arange(self.length, device=self._device)
        zero = slots.new_zeros(())
        return self._mask_mod(zero, zero, slots[:, None], slots[None])[None, None]

    @cached_property
    def _wanted(self) -> Tensor | None:
        """Dense attention in float32; None if the mask is too large."""
        query, key, value = (x.float() for x in self._expanded())
        if not self._changes_scores and self.length <= LONGEST_DENSE[self._device.type]:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=self._dense_mask)
        if self._changes_scores and self.length <= LONGEST_SCORES:
            output, _ = dense_attention(
                nn.Module(),
                query,
                key,
                value,
                self._dense_mask,
                score_mod=self._score_mod,
                scaled_part=self._scaled_part,
            )
            return output.transpose(1, 2)
        return None

    @property
    def _changes_scores(self) -> bool:
        return self._score_mod is not None or self._scaled_part is not None

    def _expanded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values repeated for each query head, for SDPA's fast kernels."""
        query, key, value = self._inputs
        groups = self._heads.query // self._heads.key
        return query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)

    def _no_dense_sdpa(self) -> str:
        """Return why SDPA cannot run with the dense mask; empty if it can."""
        longest = LONGEST_DENSE[self._device.type]
        if self._changes_scores:
            return "the strategy changes scores, which SDPA does not"
        if self.length > longest:
            gigabytes = self.length**2 / 1e9
            return f"a mask of {gigabytes:.1f} GB; dense ones are made up to {longest:,} tokens"
        return ""

    def _sdpa_dense(self) -> Callable[[], Tensor]:
        query, key, value = self._expanded()
        mask = self._dense_mask
        return lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def _sdpa_causal(self) -> Callable[[], Tensor]:
        query, key, value = self._inputs
        return lambda: F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self._heads.are_grouped
        )

    def _flex(self) -> Callable[[], Tensor]:
        """Return a call of torch's FlexAttention, with the strategy's BlockMask."""
        inputs, mask = self._inputs, self.report.block_mask
        attend: Any = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        return lambda: attend(
            *inputs,
            score_mod=self._score_mod,
            block_mask=mask,
            enable_gqa=self._heads.are_grouped,
        )

    def _flexmask(
        self, kernel: PrefillKernel | None, tile: Tile, slots: int
    ) -> Callable[[], Tensor]:
        """Return a call of the backend over whole tiles, like the engine's but for their order."""
        query, key, value = (F.pad(x, (0, 0, 0, slots - self.length)) for x in self._inputs)
        mask = create_block_mask(self._mask_mod, 1, None, slots, slots, self._device, tile)
        module = nn.Module()

        def attend() -> Tensor:
            output, _ = flexmask_attention(
                module,
                query,
                key,
                value,
                mask,
                prefill_kernel=kernel,
                score_mod=self._score_mod,
                scaled_part=self._scaled_part,
            )
            return output.transpose(1, 2)

        return attend

    def _can_flash(self) -> bool:
        dim = self._heads.dim
        shape = AttentionShape(self._heads.key, dim, dim, has_softcap=False)
        return (
            self._kernel is not None
            and not self._changes_scores
            and flash_can_attend(shape, self._dtype, self._device)
        )


def _check_memory(length: int, heads: Heads, device: torch.device, dtype: torch.dtype) -> None:
    free = free_bytes(device)
    needed = _LARGE_TENSORS * heads.query * length * heads.dim * dtype.itemsize
    if free is not None and needed > free:
        raise OptionError(
            f"{length:,} tokens with {heads.query:,} heads of {heads.dim:,} take "
            f"{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; make them fewer"
        )


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())
