"""Compiled prefill and decode of one model over a static key-value cache.

One decoder layer is compiled and serves all layers: keys and values are written to buffers bound
to the attention modules, so no layer index enters the graph. Prefill and decode run on two views
of the model that share every tensor, because they compile differently: prefill for any length,
decode for the shapes of the run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from flexmask.attention.compile_settings import compile_settings
from flexmask.attention.flex_call import PrefillKernel
from flexmask.attention.model_block_mask import ModelBlockMask
from flexmask.attention.model_probe import WHOLE_MODEL, probe_model
from flexmask.block_mask import create_block_mask
from flexmask.block_mask.cache import BlockMaskCache, BlockMaskKey
from flexmask.engine.compiled_view import (
    compile_beside_layers,
    compiled_view,
    fused_backend,
    multiply_few_rows,
)
from flexmask.engine.kv_cache import KVCache
from flexmask.engine.placed_strategy import DecodeKernel, PlacedStrategy, runs_of
from flexmask.engine.prefill_kernel import BLOCK_SIZE, PrefillKernels
from flexmask.engine.prefill_plan import PrefillPlan, plan_prefill, prefill_length
from flexmask.engine.prefix_reuse import SharedPrefix
from flexmask.errors import AttentionError, LayoutError
from flexmask.kernels.decode_attention import pays_key_table
from flexmask.layout import Layout
from flexmask.strategy import Strategy

MIN_CAPACITY = 512

LEAST_ROWS = 2
"""Prefill computes no single row of several: a dimension of one would be another graph."""


def compilations() -> int:
    """Number of graphs that torch.compile has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def bucketed_capacity(num_slots: int) -> int:
    """Cache capacity for rows of up to ``num_slots``: a power of two, and one tile more.

    Powers of two, because a longer run then seldom meets a new shape; a tile more, because a
    prefill as long as the cache would be another graph than a shorter one.
    """
    return max(MIN_CAPACITY, 1 << (num_slots - 1).bit_length()) + BLOCK_SIZE


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
        probe = probe_model(model)
        if again := probe.attends_again():
            raise AttentionError(
                f"{', '.join(again)} attends more than once in a pass, and the engine keeps the "
                "keys of one; use flexmask.use_strategy with model.generate"
            )
        self.layer_windows = probe.windows_by_layer_type()
        self.context = probe.context
        self._mask_cache = mask_cache
        names = {module: name for name, module in model.named_modules()}
        shapes = {names[module]: shape for module, shape in probe.shapes.items()}
        self._kernels = PrefillKernels(prefill_kernel, shapes.values(), self._dtype, self.device)
        self.prefill_kernel: PrefillKernel | None = None
        self._prefill_model = compiled_view(model, list(shapes), dynamic=True)
        on_gpu = self.device.type == "cuda"
        backend = fused_backend if on_gpu else "inductor"
        self._decode_model = compiled_view(model, list(shapes), dynamic=False, backend=backend)
        if on_gpu:
            # The assembler of inductor's worker processes. Another one here, as Triton brings it,
            # would make a second process compile what workers did: the cache goes by its version.
            _set_triton_ptxas_path()
            compile_beside_layers(self._decode_model, list(shapes))
        else:
            multiply_few_rows(self._decode_model)
        self.cache = KVCache((self._prefill_model, self._decode_model), shapes, self._dtype)
        self._placed: PlacedStrategy | None = None
        self.decode_kernels: dict[str, DecodeKernel] = {}
        self.shared_prefix: SharedPrefix | None = None

    def prepare(self, strategy: Strategy, batch_size: int, capacity: int) -> bool:
        """Allocate cache and buffers for ``batch_size`` rows of ``capacity`` slots.

        Returns:
            False if they were there already.

        Raises:
            AttentionError: If the strategy needs what the dtype or the prefill kernel cannot
                give.
        """
        placed = self._placed
        if placed is not None:
            there = (placed.strategy, placed.batch_size, placed.capacity)
            if there == (strategy, batch_size, capacity):
                return False
        self.release()
        placed = PlacedStrategy(
            strategy,
            batch_size,
            capacity,
            self.device,
            self.layer_windows,
            with_key_table=self._pays_key_table(batch_size),
        )
        if placed.query_part is not None and self._dtype == torch.float16:
            raise AttentionError(
                f"strategy {strategy.name!r} scales a part of the keys, for which float16 is too "
                "narrow; load the model in bfloat16 or float32"
            )
        self.prefill_kernel = self._kernels.choose(
            strategy, capacity, changes_scores=placed.changes_scores
        )
        self._tile = self._kernels.tile(self.prefill_kernel, capacity)
        self.cache.bind(batch_size, capacity)
        self._placed = placed
        return True

    def _pays_key_table(self, batch_size: int) -> bool:
        on_gpu = self.device.type == "cuda"
        return on_gpu and pays_key_table(batch_size * self.cache.most_kv_heads)

    @property
    def placed(self) -> PlacedStrategy:
        """What `prepare` made."""
        assert self._placed is not None, "prepare comes first"
        return self._placed

    def release(self) -> None:
        """Give back what `prepare` allocated."""
        self._placed = self.shared_prefix = None
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
        placed = self.placed
        if placed.changes_scores:
            return False
        size = min(LEAST_ROWS, placed.batch_size)
        plan = self._plan([layout] * size, [length, 0][:size], [()] * size)
        placed.load(plan)
        if not placed.see_only_themselves([[0]], length, plan.kv_length):
            return False
        self.cache.clear_if_tainted()
        self._compute(plan)
        values = tuple((k.clone(), v.clone()) for k, v in self.cache.of_row(0, length))
        self.shared_prefix = SharedPrefix(layout.token_ids[:length], values)
        return True

    def plan(self, layouts: Sequence[Layout]) -> PrefillPlan:
        """Work out on the host what `prefill` does for prompts: all of each but its last token.

        Args:
            layouts: One per row. Rows without one are laid out as the last of them, so that they
                can be decoded, and not computed.

        Raises:
            LayoutError: If a prompt is a single token, or leaves no room in the cache.
        """
        batch_size = self.placed.batch_size
        computed = max(len(layouts), min(LEAST_ROWS, batch_size))
        layouts = [*layouts, *[layouts[-1]] * (batch_size - len(layouts))]
        counts = [len(layout) - 1 for layout in layouts]
        if min(counts) == 0:
            raise LayoutError("a prompt needs at least two tokens")
        length = prefill_length(max(counts), max(self._tile))
        capacity = self.placed.capacity
        if length >= capacity:
            raise LayoutError(
                f"a prefill of {length} slots needs a larger capacity, got {capacity}"
            )
        shared = self.shared_prefix
        starts = [
            () if shared is None else shared.starts_in(layout) for layout in layouts[:computed]
        ]
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
            batch_size=self.placed.batch_size,
            capacity=self.placed.capacity,
            tile=self._tile,
            with_key_table=self.placed.key_table is not None,
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
        placed = self.placed
        placed.load(plan)
        placed.slots.copy_(torch.tensor(plan.counts))
        # Before the computation is queued, because asking waits for the device.
        self.decode_kernels = placed.decode_kernels()
        self.cache.clear_if_tainted()
        if any(plan.starts):
            if placed.see_only_themselves(plan.starts, plan.shared_length, plan.kv_length):
                assert self.shared_prefix is not None
                runs = runs_of(plan.starts, self.device)
                self.cache.write_runs(*runs, self.shared_prefix.cache)
            else:
                plan = self._plan(plan.layouts, plan.counts, [()] * len(plan.starts))
                placed.load(plan)
        self._compute(plan)
        placed.batch.open_tail(placed.slots)
        return plan

    @torch.no_grad()
    def _compute(self, plan: PrefillPlan) -> None:
        placed, token_slots = self.placed, plan.token_slots.to(self.device)
        rows = len(token_slots)
        masks = {kind: self._prefill_mask(kind, plan) for kind in placed.query_masks}
        arguments = dict(
            input_ids=plan.input_ids.to(self.device),
            position_ids=placed.batch.position_ids[:rows].gather(1, token_slots).long(),
            attention_mask=self._for_model(masks),
            use_cache=False,
            cache_slots=token_slots,
            tile_order=plan.tile_order.to(self.device),
            score_mod=placed.query_score_mod,
            scaled_part=placed.query_part,
        )
        compute = self._prefill_model.base_model
        with compile_settings(self.device):
            try:
                output = compute(prefill_kernel=self.prefill_kernel, **arguments)
            except InductorError as error:
                if self.prefill_kernel != "flash":
                    raise
                self.prefill_kernel = self._kernels.replace_flash(placed.strategy, error)
                output = compute(prefill_kernel=self.prefill_kernel, **arguments)
        # A key or value that is no number makes its token's hidden state none.
        hidden: Tensor = output.last_hidden_state
        largest, smallest = hidden.amax((1, 2)), hidden.amin((1, 2))
        self.cache.tainted[:rows, 0] |= ~(largest.isfinite() & smallest.isfinite())

    @torch.no_grad()
    def decode(self, token_ids: Tensor) -> Tensor:
        """Run the next token of each row, and move on by a slot.

        Nothing in it waits for the host: it can be captured as a CUDA graph.

        Args:
            token_ids: ``(B, 1)``.

        Returns:
            Logits ``(B, V)`` of the token after it.
        """
        placed = self.placed
        masks = placed.decode_masks(self.decode_kernels)
        with compile_settings(self.device):
            output = self._decode_model(
                input_ids=token_ids,
                position_ids=placed.batch.positions_at(placed.slots),
                attention_mask=self._for_model(masks),
                use_cache=False,
                cache_slots=placed.slots,
                score_mod=placed.decode_score_mod,
                scaled_part=placed.decode_part,
                key_table=placed.key_table,
            )
        placed.slots += 1
        logits: Tensor = output.logits[:, -1]
        return logits

    def _prefill_mask(self, kind: str, plan: PrefillPlan) -> BlockMask:
        mask_mod = self.placed.query_masks[kind]
        rows, length = plan.query_slots.shape
        key = BlockMaskKey(
            strategy=self.placed.strategy,
            layouts=tuple(layout.digest for layout in plan.layouts[:rows]),
            window=self.layer_windows[kind],
            q_length=length,
            kv_length=plan.kv_length,
            reused=(plan.counts[:rows], plan.starts, plan.shared_length),
            block_size=plan.tile,
            device=str(self.device),
        )

        def build() -> BlockMask:
            return create_block_mask(
                mask_mod,
                rows,
                None,
                length,
                plan.kv_length,
                self.device,
                plan.tile,
                pointwise_only=True,
            )

        return self._mask_cache.get(key, mask_mod, build)

    def _for_model(self, masks: dict[str, BlockMask]) -> BlockMask | dict[str, BlockMask]:
        given: dict[str, BlockMask] = {k: ModelBlockMask.of(mask) for k, mask in masks.items()}
        return given.get(WHOLE_MODEL, given)
