"""Compiled prefill and decode of one model over a static key-value cache.

One decoder layer is compiled and serves all layers: keys and values are written to buffers bound
to the attention modules, so no layer index enters the graph. Prefill and decode run on two views
of the model that share every tensor, because they compile differently: prefill for any length,
decode for the shapes of the run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig, PreTrainedModel

from flexmask.attention.backend import (
    CausalRows,
    bound_cache,
    compile_settings,
    find_attention_modules,
)
from flexmask.block_mask import DecodeRowMask, create_block_mask
from flexmask.block_mask.cache import BlockMaskCache, BlockMaskKey
from flexmask.block_mask.causal_rows import rows_are_causal
from flexmask.engine.fused_projections import fused_projections_backend
from flexmask.errors import AttentionError, LayoutError
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import and_masks, holds_tokens, within_window
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.strategy import MaskMod

BLOCK_SIZE = 128
"""Tile side; prefill lengths are multiples of it."""

# One tile would specialise the graph on a dimension of one, and two lengths would compile twice.
MIN_PREFILL_LENGTH = 2 * BLOCK_SIZE

MIN_CAPACITY = 512

# A decode step reads every weight once: what counts is how well each kernel reads, and how many
# there are. The first searches tile sizes, the second joins independent kernels in one launch.
DECODE_OPTIONS = {"coordinate_descent_tuning": True, "combo_kernels": True}

DecodeKernel = Literal["flex_attention", "decode_attention"]

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"


def compilations() -> int:
    """Number of graphs that torch.compile has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def prefill_length(num_tokens: int) -> int:
    """Number of query slots that a prompt of ``num_tokens`` is padded to."""
    return max(MIN_PREFILL_LENGTH, -(-num_tokens // BLOCK_SIZE) * BLOCK_SIZE)


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

    def __init__(self, model: PreTrainedModel, mask_cache: BlockMaskCache) -> None:
        """Prepare two compiled views of ``model``; nothing compiles before the first batch.

        Args:
            model: A model loaded with ``attn_implementation="flexmask"``.
            mask_cache: Where BlockMasks are kept.

        Raises:
            AttentionError: If the model does not attend through flexmask.
        """
        self.device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self.layer_windows = layer_windows(model.config.get_text_config())
        self._by_layer_type = hasattr(model.config.get_text_config(), "layer_types")
        self._mask_cache = mask_cache
        names = {module: name for name, module in model.named_modules()}
        shapes = {names[m]: shape for m, shape in find_attention_modules(model).items()}
        self._shapes = shapes
        self._prefill_model = _compiled_view(model, list(shapes), dynamic=True)
        on_gpu = self.device.type == "cuda"
        backend = fused_projections_backend(DECODE_OPTIONS) if on_gpu else "inductor"
        self._decode_model = _compiled_view(model, list(shapes), dynamic=False, backend=backend)
        self._prepared: tuple[Strategy, int, int] | None = None
        self.decode_kernels: dict[str, DecodeKernel] = {}

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
        self._bind_cache(batch_size, capacity)
        strategy_mask = and_masks(strategy.mask_mod(self._batch), holds_tokens(self._batch))
        self._mask_mods: dict[str, MaskMod] = {
            kind: strategy_mask
            if window is None
            else and_masks(strategy_mask, within_window(self._batch, window))
            for kind, window in self.layer_windows.items()
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

    def bytes_per_row(self, capacity: int) -> int:
        """Bytes of keys and values that one row of ``capacity`` slots takes."""
        values = sum(s.num_kv_heads * (s.key_dim + s.value_dim) for s in self._shapes.values())
        return values * capacity * self._dtype.itemsize

    @torch.no_grad()
    def prefill(self, layouts: Sequence[Layout]) -> None:
        """Compute keys and values of each prompt but its last token, which `decode` starts with.

        Args:
            layouts: One per row.

        Raises:
            LayoutError: If a prompt is a single token, or leaves no room in the cache.
        """
        counts = [len(layout) - 1 for layout in layouts]
        if min(counts) == 0:
            raise LayoutError("a prompt needs at least two tokens")
        length = prefill_length(max(counts))
        if length >= self._capacity:
            raise LayoutError(
                f"a prefill of {length} slots needs a larger capacity, got {self._capacity}"
            )
        self._batch.load(layouts, counts, [0] * len(layouts))
        input_ids = torch.zeros(len(layouts), length, dtype=torch.long)
        for row, (layout, count) in enumerate(zip(layouts, counts, strict=True)):
            input_ids[row, :count] = torch.tensor(layout.token_ids[:count])
        masks = {kind: self._prefill_mask(kind, layouts, length) for kind in self._mask_mods}
        with compile_settings():
            self._prefill_model.base_model(
                input_ids=input_ids.to(self.device),
                position_ids=self._batch.position_ids[:, :length].long(),
                attention_mask=self._for_model(masks),
                use_cache=False,
                cache_slots=self.slots,
            )
        self._batch.open_tail(counts)
        self.slots.copy_(torch.tensor(counts))
        self.decode_kernels = {
            kind: self._decode_kernel(mask_mod) for kind, mask_mod in self._mask_mods.items()
        }

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
        with compile_settings():
            output = self._decode_model(
                input_ids=token_ids,
                position_ids=self._batch.positions_at(self.slots),
                attention_mask=self._for_model(masks),
                use_cache=False,
                cache_slots=self.slots,
            )
        self.slots += 1
        logits: Tensor = output.logits[:, -1]
        return logits

    def _decode_kernel(self, mask_mod: MaskMod) -> DecodeKernel:
        """Which kernel attends: the one for causal rows where they are, on a GPU."""
        if self.device.type != "cuda" or not rows_are_causal(mask_mod, self.slots, self._capacity):
            return "flex_attention"
        return "decode_attention"

    def _decode_mask(self, kind: str, kernel: DecodeKernel) -> BlockMask:
        if kernel == "decode_attention":
            return self._causal_rows
        self._decode_masks[kind].update(self.slots)
        return self._decode_masks[kind].block_mask

    def cached(self, row: int, num_slots: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a row, per layer: ``(H_kv, num_slots, D)`` each."""
        buffers = [bound_cache(self._decode_model.get_submodule(name)) for name in self._shapes]
        return [(k[row, :, :num_slots], v[row, :, :num_slots]) for k, v in buffers]

    def _prefill_mask(self, kind: str, layouts: Sequence[Layout], length: int) -> BlockMask:
        mask_mod = self._mask_mods[kind]
        key = BlockMaskKey(
            strategy=self._strategy,
            layouts=tuple(layout.digest for layout in layouts),
            window=self.layer_windows[kind],
            q_length=length,
            kv_length=length,
            block_size=BLOCK_SIZE,
            device=str(self.device),
        )

        def build() -> BlockMask:
            return create_block_mask(
                mask_mod, len(layouts), None, length, length, self.device, BLOCK_SIZE
            )

        return self._mask_cache.get(key, mask_mod, build)

    def _for_model(self, masks: dict[str, BlockMask]) -> BlockMask | dict[str, BlockMask]:
        return masks if self._by_layer_type else next(iter(masks.values()))

    def _bind_cache(self, batch_size: int, capacity: int) -> None:
        for name, shape in self._shapes.items():
            size = (batch_size, shape.num_kv_heads, capacity)
            key = torch.zeros(*size, shape.key_dim, dtype=self._dtype, device=self.device)
            value = torch.zeros(*size, shape.value_dim, dtype=self._dtype, device=self.device)
            for model in (self._prefill_model, self._decode_model):
                module = model.get_submodule(name)
                module.register_buffer("key_cache", key, persistent=False)
                module.register_buffer("value_cache", value, persistent=False)


def _compiled_view(
    model: PreTrainedModel,
    attention_names: Sequence[str],
    *,
    dynamic: bool,
    backend: Any = "inductor",
) -> PreTrainedModel:
    """Copy the module tree, sharing all tensors, and compile the layers that attend."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    view = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name in attention_names:
        layer: nn.Module = view.get_submodule(name.rpartition(".")[0])
        layer.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    return view
