"""Compiled prefill and decode of one model over a static key-value cache.

One decoder layer is compiled and serves all layers: keys and values are written to buffers bound
to the attention modules, so no layer index enters the graph. Prefill and decode run on two views
of the model that share every tensor, because they compile differently: prefill for any length,
decode for the shapes of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch._dynamo import mark_static
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig, PreTrainedModel

from flexmask.attention.backend import (
    CausalRows,
    PrefillKernel,
    compile_settings,
    find_attention_modules,
)
from flexmask.attention.scaled_part import place_part
from flexmask.block_mask import DecodeRowMask, create_block_mask
from flexmask.block_mask.cache import BlockMaskCache, BlockMaskKey
from flexmask.block_mask.equality import rows_are_causal, runs_are_causal
from flexmask.engine.compiled_view import (
    compile_beside_layers,
    compiled_view,
    fused_backend,
)
from flexmask.engine.kv_cache import KVCache
from flexmask.engine.prefill_kernel import BLOCK_SIZE, PrefillKernels, prefill_tile
from flexmask.engine.prefill_plan import PrefillPlan, plan_prefill, prefill_length
from flexmask.engine.prefix_reuse import SharedPrefix
from flexmask.engine.slot_mods import mask_at_slots, score_at_slots, score_from_slots
from flexmask.errors import AttentionError, LayoutError
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import and_masks, strategy_mask, within_window
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.strategy import MaskMod, ScoreMod

MIN_CAPACITY = 512

DecodeKernel = Literal["flex_attention", "decode_attention"]

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"


def compilations() -> int:
    """Number of graphs that torch.compile has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def bucketed_capacity(num_slots: int) -> int:
    """Cache capacity for rows of up to ``num_slots``: a power of two, and one tile more.

    Powers of two, because a longer run then seldom meets a new shape; a tile more, because a
    prefill as long as the cache would be another graph than a shorter one.
    """
    return max(MIN_CAPACITY, 1 << (num_slots - 1).bit_length()) + BLOCK_SIZE


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Map each kind of attention layer in the model to its sliding window, None for full.

    Raises:
        AttentionError: If the model has layers of another kind.
    """
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if getattr(config, "attention_chunk_size", None) is not None:
        raise AttentionError("chunked attention layers are not supported by the engine")
    if layer_types is None:
        return {FULL_ATTENTION: None} if window is None else {SLIDING_ATTENTION: window}
    windows = {FULL_ATTENTION: None, SLIDING_ATTENTION: window}
    if unknown := sorted(set(layer_types) - set(windows)):
        raise AttentionError(f"layers of type {', '.join(unknown)} are not supported")
    return {kind: windows[kind] for kind in sorted(set(layer_types))}


class ModelRunner:
    """Runs batches of up to ``batch_size`` rows and ``capacity`` slots through a model."""

    def __init__(
        self,
        model: PreTrainedModel,
        mask_cache: BlockMaskCache,
        prefill_kernel: PrefillKernel | None = None,
    ) -> None:
        """Prepare two compiled views of ``model``; nothing compiles before the first batch.

        Args:
            model: A model loaded with ``attn_implementation="flexmask"``.
            mask_cache: Where BlockMasks are kept.
            prefill_kernel: What computes prompts on a GPU; None to choose.

        Raises:
            AttentionError: If the model does not attend through flexmask, or the kernel cannot
                be had.
        """
        self.device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self.layer_windows = layer_windows(model.config.get_text_config())
        self._by_layer_type = hasattr(model.config.get_text_config(), "layer_types")
        self._mask_cache = mask_cache
        names = {module: name for name, module in model.named_modules()}
        shapes = {names[m]: shape for m, shape in find_attention_modules(model).items()}
        self._kernels = PrefillKernels(prefill_kernel, shapes.values(), self._dtype, self.device)
        self.prefill_kernel: PrefillKernel | None = None
        self._prefill_model = compiled_view(model, list(shapes), dynamic=True)
        on_gpu = self.device.type == "cuda"
        backend = fused_backend if on_gpu else "inductor"
        self._decode_model = compiled_view(model, list(shapes), dynamic=False, backend=backend)
        if on_gpu:
            compile_beside_layers(self._decode_model, list(shapes))
        self.cache = KVCache((self._prefill_model, self._decode_model), shapes, self._dtype)
        self._prepared: tuple[Strategy, int, int] | None = None
        self.decode_kernels: dict[str, DecodeKernel] = {}
        self.shared_prefix: SharedPrefix | None = None
        self._decode_masks: dict[str, DecodeRowMask] = {}

    def prepare(self, strategy: Strategy, batch_size: int, capacity: int) -> bool:
        """Allocate cache and buffers for ``batch_size`` rows of ``capacity`` slots.

        Returns:
            False if they were there already.
        """
        if self._prepared == (strategy, batch_size, capacity):
            return False
        self._prepared = None
        self._strategy = strategy
        self._capacity = capacity
        self.batch_size = batch_size
        self._batch = LayoutBatch(batch_size, capacity, self.device)
        self.slots = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        self._query_slots = torch.zeros_like(self._batch.position_ids)
        mark_static(self._query_slots)
        self.shared_prefix = None
        self._set_score_mods(strategy)
        self.prefill_kernel = self._kernels.choose(
            strategy, capacity, changes_scores=self._changes_scores
        )
        self._tile = prefill_tile(self.prefill_kernel, capacity)
        self.cache.bind(batch_size, capacity)
        allowed = strategy_mask(strategy, self._batch)
        self._mask_mods: dict[str, MaskMod] = {
            kind: allowed
            if window is None
            else and_masks(allowed, within_window(self._batch, window))
            for kind, window in self.layer_windows.items()
        }
        self._query_masks = {
            kind: mask_at_slots(mask_mod, self._query_slots)
            for kind, mask_mod in self._mask_mods.items()
        }
        self._decode_masks = {
            kind: DecodeRowMask(mask_mod, batch_size, capacity, self.device)
            for kind, mask_mod in self._mask_mods.items()
        }
        none = torch.zeros(batch_size, 1, 1, 1, dtype=torch.int32, device=self.device)
        self._causal_rows = CausalRows.from_kv_blocks(
            none[..., 0], none, seq_lengths=(1, capacity), compute_q_blocks=False
        )
        self._prepared = (strategy, batch_size, capacity)
        return True

    def _set_score_mods(self, strategy: Strategy) -> None:
        score_mod, part = strategy.score_mod(self._batch), strategy.scaled_part(self._batch)
        self._changes_scores = score_mod is not None or part is not None
        self._query_score_mod: ScoreMod | None = None
        self._decode_score_mod: ScoreMod | None = None
        self._query_part = place_part(part, self._query_slots)
        self._decode_part = place_part(part, self.slots[:, None])
        if not self._changes_scores:
            return
        if self._query_part is not None and self._dtype == torch.float16:
            raise AttentionError(
                f"strategy {strategy.name!r} scales a part of the keys, for which float16 is too "
                "narrow; load the model in bfloat16 or float32"
            )
        if score_mod is not None:
            mark_static(self.slots)
            self._query_score_mod = score_at_slots(score_mod, self._query_slots)
            self._decode_score_mod = score_from_slots(score_mod, self.slots)

    def release(self) -> None:
        """Give back what `prepare` allocated."""
        self._prepared = self.shared_prefix = None
        self._decode_masks.clear()
        self.cache.bind(0, 0)

    def share_prefix(self, layout: Layout, length: int) -> bool:
        """Compute the first ``length`` tokens of a prompt once, for `prefill` to copy.

        Wherever these tokens stand at positions 0, 1, … in a prompt and provably see only
        themselves, their keys and values are copied and not computed again.

        Returns:
            False if in this prompt they see something else, or the strategy changes scores;
            then nothing is shared.
        """
        self.shared_prefix = None
        if self._changes_scores:
            return False
        size = min(2, self.batch_size)  # one of several rows would be another graph
        plan = self._plan([layout] * size, [length, 0][:size], [()] * size)
        self._batch.copy_from(plan.tables)
        if not self._see_only_themselves([[0]], length, plan.kv_length):
            return False
        self._compute(plan)
        values = tuple((k.clone(), v.clone()) for k, v in self.cache.of_row(0, length))
        self.shared_prefix = SharedPrefix(layout.token_ids[:length], values)
        return True

    def plan(self, layouts: Sequence[Layout]) -> PrefillPlan:
        """Work out on the host what `prefill` does for prompts: all of each but its last token.

        Args:
            layouts: One per row.

        Raises:
            LayoutError: If a prompt is a single token, or leaves no room in the cache.
        """
        counts = [len(layout) - 1 for layout in layouts]
        if min(counts) == 0:
            raise LayoutError("a prompt needs at least two tokens")
        length = prefill_length(max(counts), self._tile)
        if length >= self._capacity:
            raise LayoutError(
                f"a prefill of {length} slots needs a larger capacity, got {self._capacity}"
            )
        shared = self.shared_prefix
        starts = [() if shared is None else shared.starts_in(layout) for layout in layouts]
        return self._plan(layouts, counts, starts)

    def _plan(
        self,
        layouts: Sequence[Layout],
        counts: Sequence[int],
        starts: Sequence[Sequence[int]],
    ) -> PrefillPlan:
        shared_length = 0 if self.shared_prefix is None else len(self.shared_prefix.token_ids)
        return plan_prefill(
            layouts,
            counts,
            starts,
            shared_length,
            batch_size=self.batch_size,
            capacity=self._capacity,
            tile=self._tile,
        )

    @torch.no_grad()
    def prefill(self, plan: PrefillPlan) -> PrefillPlan:
        """Compute keys and values of each prompt but its last token, which `decode` starts with.

        On a GPU this returns while they are computed.

        Args:
            plan: What `plan` made of the prompts.

        Returns:
            The plan that was followed: where a prefix turns out to see more than itself it is
            not copied.
        """
        self._batch.copy_from(plan.tables)
        self.slots.copy_(torch.tensor(plan.counts))
        # Before the computation is queued, because asking waits for the device.
        self._batch.open_tail(self.slots)
        self.decode_kernels = {
            kind: self._decode_kernel(mask_mod) for kind, mask_mod in self._mask_mods.items()
        }
        self._batch.close_tail(self.slots)
        if any(plan.starts):
            if self._see_only_themselves(plan.starts, plan.shared_length, plan.kv_length):
                assert self.shared_prefix is not None
                self.cache.write_runs(*self._runs(plan.starts), self.shared_prefix.cache)
            else:
                plan = self._plan(plan.layouts, plan.counts, [()] * len(plan.layouts))
        self._compute(plan)
        self._batch.open_tail(self.slots)
        return plan

    @torch.no_grad()
    def _compute(self, plan: PrefillPlan) -> None:
        rows, length = plan.input_ids.shape
        query_slots = plan.query_slots.to(self.device)
        self._query_slots[:rows, :length] = query_slots
        masks = {kind: self._prefill_mask(kind, plan) for kind in self._mask_mods}
        arguments = dict(
            input_ids=plan.input_ids.to(self.device),
            position_ids=self._batch.position_ids[:rows].gather(1, query_slots).long(),
            attention_mask=self._for_model(masks),
            use_cache=False,
            cache_slots=query_slots,
            score_mod=self._query_score_mod,
            scaled_part=self._query_part,
        )
        compute = self._prefill_model.base_model
        with compile_settings(self.device):
            try:
                compute(prefill_kernel=self.prefill_kernel, **arguments)
            except InductorError as error:
                if self.prefill_kernel != "flash":
                    raise
                self.prefill_kernel = self._kernels.replace_flash(self._strategy, error)
                compute(prefill_kernel=self.prefill_kernel, **arguments)

    def _runs(self, starts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        runs = [(row, start) for row, own in enumerate(starts) for start in own]
        rows, firsts = torch.tensor(runs, device=self.device).unbind(1)
        return rows, firsts

    def _see_only_themselves(
        self, starts: Sequence[Sequence[int]], length: int, kv_length: int
    ) -> bool:
        rows, firsts = self._runs(starts)
        return all(
            runs_are_causal(mask_mod, rows, firsts, length, kv_length, self.layer_windows[kind])
            for kind, mask_mod in self._mask_mods.items()
        )

    @torch.no_grad()
    def decode(self, token_ids: Tensor) -> Tensor:
        """Run the next token of each row, and move on by a slot.

        Nothing in it waits for the host: it can be captured as a CUDA graph.

        Args:
            token_ids: ``(B, 1)``.

        Returns:
            Logits ``(B, V)`` of the token after it.
        """
        masks = {
            kind: self._decode_mask(kind, kernel) for kind, kernel in self.decode_kernels.items()
        }
        with compile_settings(self.device):
            output = self._decode_model(
                input_ids=token_ids,
                position_ids=self._batch.positions_at(self.slots),
                attention_mask=self._for_model(masks),
                use_cache=False,
                cache_slots=self.slots,
                score_mod=self._decode_score_mod,
                scaled_part=self._decode_part,
            )
        self.slots += 1
        logits: Tensor = output.logits[:, -1]
        return logits

    def _decode_kernel(self, mask_mod: MaskMod) -> DecodeKernel:
        """Which kernel attends: the one for causal rows where they provably are."""
        if self._changes_scores:
            return "flex_attention"
        is_causal = rows_are_causal(mask_mod, self.slots, self._capacity)
        return "decode_attention" if is_causal else "flex_attention"

    def _decode_mask(self, kind: str, kernel: DecodeKernel) -> BlockMask:
        if kernel == "decode_attention":
            return self._causal_rows
        self._decode_masks[kind].update(self.slots)
        return self._decode_masks[kind].block_mask

    def _prefill_mask(self, kind: str, plan: PrefillPlan) -> BlockMask:
        mask_mod = self._query_masks[kind]
        rows, length = plan.input_ids.shape
        key = BlockMaskKey(
            strategy=self._strategy,
            layouts=tuple(layout.digest for layout in plan.layouts),
            window=self.layer_windows[kind],
            q_length=length,
            kv_length=plan.kv_length,
            reused=(plan.counts, plan.starts, plan.shared_length),
            block_size=plan.tile,
            device=str(self.device),
        )

        def build() -> BlockMask:
            return create_block_mask(
                mask_mod, rows, None, length, plan.kv_length, self.device, plan.tile
            )

        return self._mask_cache.get(key, mask_mod, build)

    def _for_model(self, masks: dict[str, BlockMask]) -> BlockMask | dict[str, BlockMask]:
        return masks if self._by_layer_type else next(iter(masks.values()))
