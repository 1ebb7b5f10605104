"""The model runner: compiled prefill and decode over a static key-value cache.

One decoder layer is compiled and serves all layers: keys and values are written to buffers bound
to the attention modules, so no layer index enters the graph. Prefill and decode run on two views
of the model that share every tensor, because they compile differently: prefill for any length,
decode for the shapes of the run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from flexmask.attention.flex_call import PrefillKernel
from flexmask.attention.model_block_mask import ModelBlockMask
from flexmask.attention.model_probe import WHOLE_MODEL, probe_model
from flexmask.block_mask import create_block_mask
from flexmask.block_mask.cache import BlockMaskCache, BlockMaskKey
from flexmask.engine.bound_strategy import BoundStrategy, DecodeKernel, spans_of
from flexmask.engine.compiled_view import (
    compile_beside_layers,
    compiled_view,
    fused_backend,
    multiply_few_rows,
)
from flexmask.engine.kv_cache import KVCache
from flexmask.engine.memory import free_bytes
from flexmask.engine.prefill_kernel import BLOCK_SIZE, PrefillKernels
from flexmask.engine.prefill_plan import PrefillPlan, plan_prefill, prefill_length
from flexmask.engine.prefix_cache import CachedPrefix
from flexmask.errors import AttentionError, LayoutError
from flexmask.kernels.decode_attention import pays_key_table
from flexmask.layout import Layout
from flexmask.strategy import Strategy
from flexmask.torch_internals import compile_settings, inductor_error, use_bundled_assembler

MIN_CAPACITY = 512

_TABLE_BYTES = 64
"""Bytes per slot of tables on host and device: segment ids, positions, slots, masks."""

_WIDE_TENSORS = 4
"""Tensors of a layer's largest width that are in memory at once: gate, up, product, output."""

LEAST_ROWS = 2
"""Fewest rows that a prefill computes, because a dimension of one would be another graph."""


def bucketed_capacity(num_slots: int) -> int:
    """Round up the capacity of a cache for ``num_slots``: to a power of two, plus one tile.

    A power of two, because longer prompts then seldom need a new shape; a tile more, because a
    prefill as long as the cache would be another graph than a shorter one.
    """
    return max(MIN_CAPACITY, 1 << (num_slots - 1).bit_length()) + BLOCK_SIZE


class ModelRunner:
    """Prefills and decodes batches with one model; the executor makes it and prepares it.

    Attributes:
        device: Device of the model.
        layer_windows: Sliding window of each kind of layer, in tokens; None for no window.
        context: Positions that the model knows; None for no limit.
        prefill_kernel: The kernel that computes prompts on a GPU, once `prepare` has chosen it.
        cache: The key-value cache.
        decode_kernels: The kernel that decodes the current batch, by kind of layer.
        cached_prefix: The prefix that `prefill` copies; None for none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mask_cache: BlockMaskCache,
        prefill_kernel: PrefillKernel | None = None,
    ) -> None:
        """Prepare two compiled views of ``model``; nothing compiles before the first batch.

        Args:
            model: A model loaded with ``attn_implementation="flexmask"``.
            mask_cache: Keeps BlockMasks.
            prefill_kernel: The kernel that computes prompts on a GPU; None to choose.

        Raises:
            AttentionError: If the model does not attend through flexmask, or the kernel is not
                available.
        """
        self.device = next(model.parameters()).device
        self._is_on_cpu = self.device.type == "cpu"
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
            use_bundled_assembler()
            compile_beside_layers(self._decode_model, list(shapes))
        else:
            multiply_few_rows(self._decode_model)
        self.cache = KVCache((self._prefill_model, self._decode_model), shapes, self._dtype)
        self._token_bytes = _WIDE_TENSORS * _widest(model) * self._dtype.itemsize
        self._bound: BoundStrategy | None = None
        self.decode_kernels: dict[str, DecodeKernel] = {}
        self.cached_prefix: CachedPrefix | None = None

    def prepare(self, strategy: Strategy, batch_size: int, capacity: int) -> bool:
        """Allocate cache and buffers for ``batch_size`` rows of ``capacity`` slots.

        Returns:
            False if they were allocated already.

        Raises:
            AttentionError: If the dtype or the prefill kernel does not support the strategy.
            torch.OutOfMemoryError: If memory does not suffice. On a CPU that is estimated before
                anything is allocated, because Linux overcommits memory and later kills the process
                that uses it.
        """
        bound = self._bound
        if bound is not None:
            current = (bound.strategy, bound.batch_size, bound.capacity)
            if current == (strategy, batch_size, capacity):
                return False
        self.release()
        if self._is_on_cpu and self.rows_that_fit(batch_size, capacity) < batch_size:
            raise torch.OutOfMemoryError(f"no room for {batch_size} rows of {capacity} slots")
        bound = BoundStrategy(
            strategy,
            batch_size,
            capacity,
            self.device,
            self.layer_windows,
            with_key_table=self._pays_key_table(batch_size),
        )
        if bound.query_part is not None and self._dtype == torch.float16:
            raise AttentionError(
                f"strategy {strategy.name!r} scales a part of the keys, for which float16 is too "
                "narrow; load the model in bfloat16 or float32"
            )
        self.prefill_kernel = self._kernels.choose(
            strategy, capacity, changes_scores=bound.changes_scores
        )
        self._tile = self._kernels.tile(self.prefill_kernel, capacity)
        self.cache.bind(batch_size, capacity)
        self._bound = bound
        return True

    def rows_that_fit(self, rows: int, capacity: int) -> int:
        """Halve a number of rows until free memory has room for them.

        On a GPU, and for a single row, only keys and values are counted.

        Args:
            rows: Rows wanted.
            capacity: Slots per row.

        Returns:
            The number of rows that fit; 0 if not even one fits.
        """
        free = free_bytes(self.device)
        if free is None:
            return rows
        free += self.cache.num_bytes  # freed before other rows are bound
        while rows > 1 and rows * self.bytes_per_row(capacity) > free:
            rows //= 2
        return rows if rows * self.cache.bytes_per_row(capacity) <= free else 0

    def bytes_per_row(self, capacity: int) -> int:
        """Return the bytes of a row: keys, values and, on a CPU, intermediate tensors."""
        computed = capacity * (_TABLE_BYTES + self._token_bytes) if self._is_on_cpu else 0
        return self.cache.bytes_per_row(capacity) + computed

    def _pays_key_table(self, batch_size: int) -> bool:
        on_gpu = self.device.type == "cuda"
        return on_gpu and pays_key_table(batch_size * self.cache.most_kv_heads)

    @property
    def bound(self) -> BoundStrategy:
        """The strategy that `prepare` has bound to buffers."""
        assert self._bound is not None, "prepare comes first"
        return self._bound

    def release(self) -> None:
        """Free what `prepare` allocated."""
        self._bound = self.cached_prefix = None
        self.cache.bind(0, 0)

    def cache_prefix(self, layout: Layout, length: int) -> bool:
        """Compute the first ``length`` tokens of a prompt as the prefix that `prefill` copies.

        Wherever a prompt holds these tokens at positions 0, 1, …, and they are proved to see only
        themselves, their keys and values are copied and not computed again.

        Returns:
            False if they see other tokens in this prompt, or the strategy changes scores; then
            there is no cached prefix.
        """
        self.cached_prefix = None
        bound = self.bound
        if bound.changes_scores:
            return False
        size = min(LEAST_ROWS, bound.batch_size)
        plan = self._plan([layout] * size, [length, 0][:size], [()] * size)
        bound.load(plan)
        if not bound.see_only_themselves([[0]], length, plan.kv_length):
            return False
        self.cache.clear_if_tainted()
        self._compute(plan)
        values = tuple((k.clone(), v.clone()) for k, v in self.cache.of_row(0, length))
        self.cached_prefix = CachedPrefix(layout.token_ids[:length], values)
        return True

    def plan(self, layouts: Sequence[Layout]) -> PrefillPlan:
        """Plan the prefill of prompts on the host: all tokens of each but the last.

        Args:
            layouts: The layouts of the prompts, one per row. The last of them is repeated in rows
                that have none, so that these can be decoded; their prompts are not computed.

        Raises:
            LayoutError: If a prompt is a single token, or leaves no room in the cache.
        """
        batch_size = self.bound.batch_size
        computed = max(len(layouts), min(LEAST_ROWS, batch_size))
        layouts = [*layouts, *[layouts[-1]] * (batch_size - len(layouts))]
        counts = [len(layout) - 1 for layout in layouts]
        if min(counts) == 0:
            raise LayoutError("a prompt needs at least two tokens")
        length = prefill_length(max(counts), max(self._tile))
        capacity = self.bound.capacity
        if length >= capacity:
            raise LayoutError(
                f"a prefill of {length} slots needs a larger capacity, got {capacity}"
            )
        shared = self.cached_prefix
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
        cached_tokens = 0 if self.cached_prefix is None else len(self.cached_prefix.token_ids)
        return plan_prefill(
            layouts,
            counts,
            starts,
            cached_tokens,
            batch_size=self.bound.batch_size,
            capacity=self.bound.capacity,
            tile=self._tile,
            with_key_table=self.bound.key_table is not None,
        )

    @torch.no_grad()
    def prefill(self, plan: PrefillPlan) -> PrefillPlan:
        """Compute the keys and values of prompts, but for the last token of each.

        `decode` starts with that token. On a GPU this returns before they are computed.

        Args:
            plan: The plan that `plan` made for the prompts.

        Returns:
            The plan that was followed. It is another one where the cached prefix would see more
            than itself, because then it is computed and not copied.
        """
        bound = self.bound
        bound.load(plan)
        bound.slots.copy_(torch.tensor(plan.counts))
        # Before the computation is queued, because this waits for the device.
        self.decode_kernels = bound.decode_kernels()
        self.cache.clear_if_tainted()
        if any(plan.starts):
            if bound.see_only_themselves(plan.starts, plan.cached_tokens, plan.kv_length):
                assert self.cached_prefix is not None
                spans = spans_of(plan.starts, self.device)
                self.cache.write_spans(*spans, self.cached_prefix.values)
            else:
                plan = self._plan(plan.layouts, plan.counts, [()] * len(plan.starts))
                bound.load(plan)
        self._compute(plan)
        bound.batch.open_tail(bound.slots)
        return plan

    @torch.no_grad()
    def _compute(self, plan: PrefillPlan) -> None:
        bound, token_slots = self.bound, plan.token_slots.to(self.device)
        rows = len(token_slots)
        masks = {kind: self._prefill_mask(kind, plan) for kind in bound.query_masks}
        arguments = dict(
            input_ids=plan.input_ids.to(self.device),
            position_ids=bound.batch.position_ids[:rows].gather(1, token_slots).long(),
            attention_mask=self._for_model(masks),
            use_cache=False,
            cache_slots=token_slots,
            tile_order=plan.tile_order.to(self.device),
            score_mod=bound.query_score_mod,
            scaled_part=bound.query_part,
        )
        compute = self._prefill_model.base_model
        with compile_settings(self.device):
            try:
                output = compute(prefill_kernel=self.prefill_kernel, **arguments)
            except inductor_error() as error:
                if self.prefill_kernel != "flash":
                    raise
                self.prefill_kernel = self._kernels.replace_flash(bound.strategy, error)
                output = compute(prefill_kernel=self.prefill_kernel, **arguments)
        # A key or value that is NaN or infinite makes the hidden state of its token so too.
        hidden: Tensor = output.last_hidden_state
        largest, smallest = hidden.amax((1, 2)), hidden.amin((1, 2))
        self.cache.tainted[:rows, 0] |= ~(largest.isfinite() & smallest.isfinite())

    @torch.no_grad()
    def decode(self, token_ids: Tensor) -> Tensor:
        """Run one token of each row through the model, and advance by one slot.

        Nothing in it waits for the host, so it can be captured as a CUDA graph.

        Args:
            token_ids: ``(B, 1)``, the last token of each row so far.

        Returns:
            Logits ``(B, V)`` of the next token.
        """
        bound = self.bound
        masks = bound.decode_masks(self.decode_kernels)
        with compile_settings(self.device):
            output = self._decode_model(
                input_ids=token_ids,
                position_ids=bound.batch.positions_at(bound.slots),
                attention_mask=self._for_model(masks),
                use_cache=False,
                cache_slots=bound.slots,
                score_mod=bound.decode_score_mod,
                scaled_part=bound.decode_part,
                key_table=bound.key_table,
            )
        bound.slots += 1
        logits: Tensor = output.logits[:, -1]
        return logits

    def _prefill_mask(self, kind: str, plan: PrefillPlan) -> BlockMask:
        mask_mod = self.bound.query_masks[kind]
        rows, length = plan.query_slots.shape
        key = BlockMaskKey(
            strategy=self.bound.strategy,
            layouts=tuple(layout.digest for layout in plan.layouts[:rows]),
            window=self.layer_windows[kind],
            q_length=length,
            kv_length=plan.kv_length,
            reused=(plan.counts[:rows], plan.starts, plan.cached_tokens),
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


def num_embeddings(model: PreTrainedModel) -> int:
    """Return the number of token embeddings of a model."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _widest(model: PreTrainedModel) -> int:
    """Return the numbers per token in the largest tensor that a layer computes."""
    vocabulary = num_embeddings(model)
    sizes = [parameter.shape[-2:] for parameter in model.parameters() if parameter.ndim > 1]
    return max((max(size) for size in sizes if vocabulary not in size), default=0)
