"""The model runner: compiled prefill and decode over a static key-value cache.

One decoder layer is compiled and serves all layers: keys and values are written to buffers bound
to the attention modules, so no layer index enters the graph. Prefill and decode run on views of
the model that share every tensor, because they compile differently: prefill for any length, decode
for the shapes of the run. A prefill before decoding ends once the last layer has written its keys
and values; scoring needs the hidden states too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from flexmask.attention.backend import KeysWritten
from flexmask.attention.flex_call import PrefillKernel
from flexmask.attention.key_turns import KeyTurn, key_turns
from flexmask.attention.model_block_mask import ModelBlockMask
from flexmask.attention.model_probe import WHOLE_MODEL, probe_model, rotations
from flexmask.block_mask.cache import BlockMaskCache
from flexmask.engine.bound_strategy import BoundStrategy
from flexmask.engine.choice_prompt import ChoicePrompt
from flexmask.engine.compiled_view import (
    compile_beside_layers,
    compiled_view,
    fused_backend,
    last_layer_name,
    multiply_few_rows,
)
from flexmask.engine.kv_cache import KVCache
from flexmask.engine.memory import is_out_of_memory
from flexmask.engine.output_head import OutputHead, TokenScores
from flexmask.engine.prefill_graphs import PrefillGraphs
from flexmask.engine.prefill_kernel import BLOCK_SIZE, PrefillKernels
from flexmask.engine.prefill_plan import DecodeKernel, PrefillPlan
from flexmask.engine.prefill_planner import PrefillPlanner
from flexmask.engine.prefix_cache import CachedPrefix
from flexmask.engine.ranks import Ranks, SharedOutOfMemory, on_all_ranks
from flexmask.engine.row_loading import to_device
from flexmask.engine.span_sharing import PromptSpans
from flexmask.engine.stream_inputs import StreamInputs, stream_block_mask
from flexmask.engine.stream_planner import StreamPlanner
from flexmask.errors import AttentionError, LayoutError, OptionError
from flexmask.kernels.decode_attention import pays_key_table
from flexmask.kv_store.kv_format import KVFormat
from flexmask.kv_store.options import KVCacheOptions
from flexmask.kv_store.span_values import SpanValues
from flexmask.kv_store.store import KVStore
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch
from flexmask.strategy import Strategy
from flexmask.tensor_parallel.collectives import begun, sum_over_ranks
from flexmask.tensor_parallel.sharding import sums_of_pass
from flexmask.torch_internals import compile_settings, inductor_error, use_bundled_assembler

MIN_CAPACITY = 512

_TABLE_BYTES = 64
"""Bytes per slot of tables on host and device: segment ids, positions, slots, masks."""

_WIDE_TENSORS = 4
"""Tensors of a layer's largest width that are in memory at once: gate, up, product, output."""


def bucketed_capacity(num_slots: int) -> int:
    """Round up the capacity of a cache for ``num_slots``: to a power of two, plus one tile.

    A power of two, because longer prompts then seldom need a new shape; a tile more, for the
    tokens that are decoded after a prompt whose length is one.
    """
    return max(MIN_CAPACITY, 1 << (num_slots - 1).bit_length()) + BLOCK_SIZE


class ModelRunner:
    """Prefills and decodes batches with one model; the executor makes it and prepares it.

    Attributes:
        ranks: The processes that hold the model.
        device: Device of the model.
        layer_windows: Sliding window of each kind of layer, in tokens; None for no window.
        context: Positions that the model knows; None for no limit.
        prefill_kernel: The kernel that computes prompts on a GPU, once `prepare` has chosen it.
        cache: The key-value cache.
        decode_kernels: The kernel that decodes the rows in flight, by kind of layer.
        cached_prefix: The prefix that `prefill` copies; None for none.
        store: Keys and values of spans, which `prefill` copies or adds; None for none.
        fixed_position_reason: Why spans are reused at their own position only; None if they are
            reused at any. `use_store` finds it out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mask_cache: BlockMaskCache,
        prefill_kernel: PrefillKernel | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Prepare compiled views of ``model``; nothing compiles before the first batch.

        Args:
            model: A model loaded with ``attn_implementation="flexmask"``, or this rank's shard.
            mask_cache: Keeps BlockMasks.
            prefill_kernel: The kernel that computes prompts on a GPU; None to choose.
            ranks: The processes that hold the model; None for this one alone.

        Raises:
            AttentionError: If the model does not attend through flexmask, or the kernel is not
                available.
        """
        self.ranks = ranks or Ranks()
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
        self._states_model = compiled_view(model, list(shapes), dynamic=True)
        self._keys_model = compiled_view(model, list(shapes), dynamic=True, ends_with_keys=True)
        on_gpu = self.device.type == "cuda"
        backend = fused_backend if on_gpu else "inductor"
        self._decode_model = compiled_view(model, list(shapes), dynamic=False, backend=backend)
        self._head = OutputHead(self._states_model)
        if on_gpu:
            use_bundled_assembler()
            compile_beside_layers(self._decode_model, list(shapes))
        else:
            multiply_few_rows(self._decode_model)
        views = (self._states_model, self._keys_model, self._decode_model)
        self.cache = KVCache(views, shapes, self._dtype)
        self._token_bytes = _WIDE_TENSORS * _widest(model) * self._dtype.itemsize
        self._bound: BoundStrategy | None = None
        self._planner: PrefillPlanner | None = None
        self._graphs = PrefillGraphs(self.device)
        self._kernels_of_rows: list[Mapping[str, DecodeKernel]] = []
        self.decode_kernels: dict[str, DecodeKernel] = {}
        self.cached_prefix: CachedPrefix | None = None
        self.store: KVStore | None = None
        self.fixed_position_reason: str | None = None
        self._probe, self._names = probe, names
        last_layer = model.get_submodule(last_layer_name(list(shapes)))
        self._sums = sums_of_pass(model.base_model, last_layer)
        self._turns: Mapping[str, KeyTurn] = {}
        self._store_bytes = 0

    def use_store(
        self, options: KVCacheOptions, model: str, model_files: Mapping[str, str]
    ) -> None:
        """Keep keys and values of spans in a store, and copy them from there.

        Args:
            options: Where, and how many bytes.
            model: Name of the model.
            model_files: Identity of its files.

        Raises:
            KVStoreError: If the folder is that of another model, or cannot be written.
            OptionError: If GPU memory is asked for and the model is on a CPU.
        """
        if options.gpu_bytes and self._is_on_cpu:
            raise OptionError("gpu_bytes needs a model on a GPU; on a CPU, set host_bytes")
        turns = key_turns(self._probe)
        self._turns = {self._names[module]: turn for module, turn in turns.by_module.items()}
        self.fixed_position_reason = turns.reason
        kv_format = KVFormat(
            model,
            model_files,
            str(self._dtype).removeprefix("torch."),
            self.cache.layer_groups,
            {"rotary": rotations(self._probe.model.config.get_text_config())},
        )
        self._store_bytes = options.host_bytes if self._is_on_cpu else options.gpu_bytes
        self.store = KVStore(
            kv_format,
            device=self.device,
            device_bytes=self._store_bytes,
            host_bytes=0 if self._is_on_cpu else options.host_bytes,
            folder=options.folder,
            folder_bytes=options.folder_bytes if options.folder else 0,
        )

    @property
    def turns_keys(self) -> bool:
        """True if the store's keys can be turned, so that spans are reused at any position."""
        return bool(self._turns)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the device's memory that the store may still take."""
        return self._store_bytes - self.store.held_bytes[0] if self.store else 0

    @on_all_ranks("runner")
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
        if self.prepared_for == (strategy, batch_size, capacity):
            return False
        self.release()
        if capacity % BLOCK_SIZE:
            raise LayoutError(f"capacity must be a multiple of {BLOCK_SIZE}, got {capacity}")
        if self._is_on_cpu and self.rows_that_fit(batch_size, capacity) < batch_size:
            raise torch.OutOfMemoryError(f"no room for {batch_size} rows of {capacity} slots")
        with_key_table = self._pays_key_table(batch_size)
        has_changes = strategy.changes_scores(LayoutBatch(1, 1, torch.device("cpu")))
        self.prefill_kernel = self._kernels.choose(strategy, capacity, changes_scores=has_changes)
        self._tile = self._kernels.tile(self.prefill_kernel, capacity)
        streams = StreamPlanner(
            strategy,
            batch_size,
            capacity,
            self.layer_windows,
            self._tile,
            self._mask_cache,
            on_gpu=not self._is_on_cpu,
        )
        self._planner = PrefillPlanner(
            strategy,
            batch_size,
            capacity,
            self.layer_windows,
            streams,
            with_key_table=with_key_table,
            turns_keys=self.turns_keys,
        )
        bound = BoundStrategy(
            strategy,
            batch_size,
            capacity,
            self.device,
            self.layer_windows,
            (streams.most_tiles, self._tile[0]),
            with_key_table=with_key_table,
        )
        if bound.query_part is not None and self._dtype == torch.float16:
            raise AttentionError(
                f"strategy {strategy.name!r} scales a part of the keys, for which float16 is too "
                "narrow; load the model in bfloat16 or float32"
            )
        # With a key table, a spare row holds the cached prefix for all others.
        self.cache.bind(batch_size + with_key_table, capacity)
        self._kernels_of_rows = [{}] * batch_size
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
        free = self.ranks.least_free_bytes(self.device)
        if free is None:
            return rows
        free += self.cache.num_bytes - self.reserved_bytes  # freed before other rows are bound
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
    def prepared_for(self) -> tuple[Strategy, int, int] | None:
        """Strategy, batch rows and capacity that `prepare` was called with last; None for none."""
        bound = self._bound
        return None if bound is None else (bound.strategy, bound.batch_size, bound.capacity)

    @property
    def bound(self) -> BoundStrategy:
        """The strategy that `prepare` has bound to buffers."""
        assert self._bound is not None, "prepare comes first"
        return self._bound

    @property
    def planner(self) -> PrefillPlanner:
        """The planner of prefills that `prepare` has made."""
        assert self._planner is not None, "prepare comes first"
        return self._planner

    @on_all_ranks("runner")
    def release(self) -> None:
        """Free what `prepare` allocated."""
        self._bound = self._planner = self.cached_prefix = None
        self._graphs.clear()
        self.cache.bind(0, 0)

    @property
    def reads_key_table(self) -> bool:
        """True if decoding reads keys through a table, which pays for a cached prefix only."""
        return self.bound.key_table is not None and self.cached_prefix is not None

    @on_all_ranks("runner")
    def forget_prefix(self) -> None:
        """Copy no prefix from now on."""
        self.cached_prefix = None

    @on_all_ranks("runner", computes=True)
    @torch.no_grad()
    def cache_prefix(self, layout: Layout, length: int) -> PrefillPlan | None:
        """Compute the first ``length`` tokens of a prompt as the prefix that `prefill` copies.

        What the store has of it is copied.

        Wherever a prompt holds these tokens at positions 0, 1, …, and they are proved to see only
        themselves, their keys and values are copied and not computed again. It is computed in row
        0, so no row may be in flight.

        Returns:
            The plan that was carried out; None if they are not proved to see only themselves, with
            unchanged scores. Then there is no cached prefix.
        """
        self.cached_prefix = None
        plan = self.planner.plan_prefix(layout, length, self.store)
        if plan is None:
            return None
        self._run(plan)
        bound, values = self.bound, self.cache.copy_of(0, length)
        if bound.key_table is not None:
            self.cache.write([bound.batch_size * bound.capacity], values)
        self.cached_prefix = CachedPrefix(layout.token_ids[:length], values)
        return plan

    @on_all_ranks("runner")
    def plan(
        self, prompts: Mapping[int, Layout], max_new_tokens: int | None = None
    ) -> PrefillPlan:
        """Plan the prefill of prompts on the host: all tokens of each but the last.

        Args:
            prompts: The layout of each prompt, by the batch row that it will be in.
            max_new_tokens: Most tokens that are decoded; None for all that fit.

        Raises:
            LayoutError: If a prompt is a single token, or leaves no room in the cache.
        """
        return self.planner.plan(prompts, self.cached_prefix, self.store, max_new_tokens)

    @on_all_ranks("runner", is_answered=False)
    def foresee(self, layouts: Sequence[Layout], max_new_tokens: int) -> None:
        """Look at prompts that will be planned soon (`PrefillPlanner.foresee`)."""
        self.planner.foresee(layouts, max_new_tokens)

    @on_all_ranks("runner", computes=True)
    @torch.no_grad()
    def prefill(self, plan: PrefillPlan) -> None:
        """Compute the keys and values of prompts, but for the last token of each.

        `decode` starts with that token. Rows that are not in the plan keep their prompts. On a GPU
        this returns before anything is computed.

        Args:
            plan: The plan that `plan` made for the prompts.
        """
        rows = self._run(plan)
        bound = self.bound
        bound.batch.open_tail_of(rows, bound.slots[rows])
        for row in plan.rows:
            self._kernels_of_rows[row] = plan.decode_kernels
        self.decode_kernels = {
            kind: "flex_attention"
            if any(of_row.get(kind) == "flex_attention" for of_row in self._kernels_of_rows)
            else "decode_attention"
            for kind in bound.query_masks
        }
        bound.make_decode_masks(self.decode_kernels)

    def plan_spans(self, prompts: Sequence[PromptSpans]) -> PrefillPlan:
        """Plan to compute the spans that prompts want, and what these see.

        Args:
            prompts: The prompts with their batch rows.
        """
        assert self.store is not None, "use_store comes first"
        return self.planner.plan_spans(prompts, self.store)

    @torch.no_grad()
    def compute_spans(self, plan: PrefillPlan) -> None:
        """Compute spans, and give them to the store; on a GPU, wait until they are computed.

        Args:
            plan: The plan that `plan_spans` made.
        """
        self._run(plan)
        if not self._is_on_cpu:
            torch.cuda.synchronize(self.device)

    @on_all_ranks("runner")
    def plan_choices(self, prompts: Mapping[int, ChoicePrompt]) -> PrefillPlan:
        """Plan to compute all tokens of prompts and of the choices stored behind them.

        Args:
            prompts: The prompts, by batch row.
        """
        layouts = {row: prompt.layout for row, prompt in prompts.items()}
        return self.planner.plan_whole(layouts, self.cached_prefix, self.store)

    @on_all_ranks("runner", computes=True)
    @torch.no_grad()
    def score(self, plan: PrefillPlan, slots: Tensor, token_ids: Tensor) -> TokenScores:
        """Compute prompts, and score a token after each of some slots.

        Args:
            plan: The plan that `plan_choices` made.
            slots: ``(N,)`` slots, counted over the slots of all rows, on the CPU.
            token_ids: ``(N,)`` the token that follows each of them, on the CPU.
        """
        assert plan.inputs is not None, "a prompt's last token is never copied"
        self._load(plan)
        on_device = plan.inputs.packed(self._slack).to(self.device, non_blocking=True)
        output = self._pass(self._states_model, plan.inputs.over(on_device))
        stream = plan.inputs.stream
        token_at = torch.full((self._num_keys,), -1, dtype=torch.long)
        token_at[stream.slots.long()] = stream.sources.long()
        assert (token_at[slots] >= 0).all(), "a token that predicts is never copied"
        places = to_device(token_at[slots], self.device)
        self._keep(plan)
        return self._head.score(output, places, to_device(token_ids, self.device))

    def _run(self, plan: PrefillPlan) -> Tensor:
        """Load the prompts of a plan, copy and compute; returns its rows on the device.

        Raises:
            SharedOutOfMemory: If this rank's memory does not suffice, and others may compute.
        """
        if self.ranks.size == 1 or plan.inputs is None or self._sums is None:
            return self._run_alone(plan)
        before = begun()
        try:
            return self._run_alone(plan)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        # Outside of the handler, because the error holds the tensors of its frames.
        for width in self._sums[begun() - before :]:
            size = (1, len(plan.inputs.token_ids), width)
            sum_over_ranks(torch.zeros(size, dtype=self._dtype, device=self.device))
        raise SharedOutOfMemory(reason)

    def _run_alone(self, plan: PrefillPlan) -> Tensor:
        rows = self._load(plan)
        if plan.inputs is not None:
            self._graphs.run(self._compute, plan.inputs, slack=self._slack)
        self._keep(plan)
        return rows

    def _keep(self, plan: PrefillPlan) -> None:
        """Give the store the spans of a plan that has been computed."""
        for span in plan.kept:
            assert self.store is not None
            values = self.cache.copy_of(span.first_slot, span.length)
            self.store.put(span.identity, SpanValues(values, span.first_position))

    def _load(self, plan: PrefillPlan) -> Tensor:
        """Load the prompts of a plan, and copy keys; returns its rows on the device."""
        bound = self.bound
        rows = to_device(torch.tensor(plan.rows), self.device)
        bound.load(plan, rows)
        self.cache.clear(to_device(plan.stale_slots, self.device))
        for copy in plan.copies:
            values = copy.values
            if copy.old_position != copy.new_position:
                positions = (copy.old_position, copy.new_position)
                values = self.cache.turned(values, self._turns, *positions)
            self.cache.write(copy.first_slots, values)
        return rows

    @property
    def _slack(self) -> int:
        """Numbers in memory behind the inputs of a prefill (`stream_block_mask`)."""
        return self._num_keys // self._tile[1]

    @property
    def _num_keys(self) -> int:
        """Slots of all rows of the cache."""
        bound = self.bound
        return (bound.batch_size + (bound.key_table is not None)) * bound.capacity

    def _compute(self, inputs: StreamInputs) -> None:
        """Compute the keys and values of a stream; nothing in it waits for the host."""
        with suppress(KeysWritten):
            self._pass(self._keys_model, inputs)

    def _pass(self, view: PreTrainedModel, inputs: StreamInputs) -> BaseModelOutputWithPast:
        """Run a stream of ``T`` tokens; the output has hidden states ``(1, T, D)``."""
        bound = self.bound
        count = len(inputs.tile_rows)
        bound.tile_rows[:count] = inputs.tile_rows
        bound.tile_slots[:count] = inputs.tile_slots
        with compile_settings(self.device):
            try:
                return self._compute_tiles(view, inputs)
            except inductor_error() as error:
                if self.prefill_kernel != "flash":
                    raise
                self.prefill_kernel = self._kernels.replace_flash(bound.strategy, error)
                return self._compute_tiles(view, inputs)

    def _compute_tiles(
        self, view: PreTrainedModel, inputs: StreamInputs
    ) -> BaseModelOutputWithPast:
        bound, flat = self.bound, self._has_flat_tiles
        mask_mods = bound.flat_masks if flat else bound.query_masks
        masks = {
            kind: stream_block_mask(tiles, self._tile, self._num_keys, mask_mods[kind], flat=flat)
            for kind, tiles in inputs.tiles.items()
        }
        output: BaseModelOutputWithPast = view.base_model(
            input_ids=inputs.token_ids[None].long(),
            position_ids=inputs.position_ids[None].long(),
            attention_mask=self._for_model(masks),
            use_cache=False,
            stream=inputs.stream,
            prefill_kernel=self.prefill_kernel,
            score_mod=bound.query_score_mod,
            scaled_part=bound.query_part,
        )
        return output

    @property
    def _has_flat_tiles(self) -> bool:
        """True if all tiles of queries are one batch entry of the kernel."""
        return self.prefill_kernel == "flash"

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
                key_table=bound.key_table if self.reads_key_table else None,
            )
        # A row that has ended goes on until it gets another prompt.
        bound.slots.add_(1).clamp_(max=bound.capacity - 1)
        logits: Tensor = output.logits[:, -1]
        return logits

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
