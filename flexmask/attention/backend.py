"""The attention backend ``flexmask``, registered with transformers.

A model loaded with ``attn_implementation="flexmask"`` computes its attention here, through
compiled FlexAttention and a BlockMask; no method of the model is replaced. ``flexmask_dense`` is
the reference: the same masks as dense tensors, and plain matrix products. It is used only if it is
chosen by name. Models that mask scores in code of their own take its dense mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface

from flexmask.attention import BACKEND, DENSE_BACKEND
from flexmask.attention.added_mask import seen_through
from flexmask.attention.dense_weights import dense_weights, index_axes
from flexmask.attention.flex_call import PrefillKernel, TokenStream, attend, check_lengths
from flexmask.attention.measuring_mask import MeasuringMask
from flexmask.attention.model_block_mask import ModelBlockMask
from flexmask.attention.model_probe import ProbeMask
from flexmask.attention.scaled_part import PlacedPart
from flexmask.attention.strategy_context import note_attention
from flexmask.errors import AttentionError
from flexmask.kernels.decode_attention import KeyTable
from flexmask.kernels.few_rows import kept_apart
from flexmask.torch_internals import assume

if TYPE_CHECKING:
    from flexmask.mod_types import ScoreMod


class KeysWritten(Exception):
    """Ends a pass that serves to write keys and values, once its last layer has written them."""


class CausalRows(ModelBlockMask):
    """The mask of a decode step in which each query sees every slot up to its own.

    It replaces an equal BlockMask, whose tiles are not read: attention runs in a kernel for this
    case.
    """


def register_attention() -> None:
    """Register ``flexmask`` and ``flexmask_dense`` as attention implementations.

    Call it before loading a model with ``attn_implementation="flexmask"``.
    """
    from flexmask.attention.model_masks import model_block_mask, model_dense_mask

    AttentionInterface.register(BACKEND, flexmask_attention)
    AttentionMaskInterface.register(BACKEND, model_block_mask)
    AttentionInterface.register(DENSE_BACKEND, dense_attention)
    AttentionMaskInterface.register(DENSE_BACKEND, model_dense_mask)


def flexmask_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    softcap: float | None = None,
    cache_slots: Tensor | None = None,
    stream: TokenStream | None = None,
    ends_pass: bool = False,
    prefill_kernel: PrefillKernel | None = None,
    score_mod: ScoreMod | None = None,
    scaled_part: PlacedPart | None = None,
    key_table: KeyTable | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend under a BlockMask.

    Args:
        module: The calling attention module; has the key and value caches if they are bound.
        query: ``(B, H, Q, D)``.
        key: ``(B, H_kv, K, D)``, with ``H`` a multiple of ``H_kv``.
        value: ``(B, H_kv, K, D_v)``.
        attention_mask: The mask of ``Q`` queries and ``K`` keys. With ``cache_slots`` or
            ``stream``, the keys are all slots of the cache.
        scaling: Factor on the scores; default ``D ** -0.5``.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        cache_slots: ``(B,)`` slots of ``module.key_cache`` and ``module.value_cache`` that the
            key and value of each row are written to; one query per row.
        stream: Where the keys and values of a prefill are written, and the order of queries that
            the mask is for; one batch row, which holds the tokens of many.
        ends_pass: Raise `KeysWritten` once the keys and values of a stream are written.
        prefill_kernel: The kernel for a prefill whose lengths are multiples of the tile.
        score_mod: Changes scores, after scaling and capping.
        scaled_part: Keys whose log-sum-exp is scaled, after ``score_mod``.
        key_table: The slots of the keys of each decode row, if keys are read through a table.
        kwargs: Other arguments of transformers; refused if they change attention.

    Returns:
        ``(B, Q, H, D_v)``, and None for the attention weights.

    Raises:
        AttentionError: If the model asks for something that this backend does not compute.
        KeysWritten: With ``ends_pass``.
    """
    _refuse_unsupported(module, kwargs)
    if isinstance(attention_mask, ProbeMask):
        return attention_mask.note(module, (query, key, value), softcap, cache_slots), None
    note_attention()
    if isinstance(attention_mask, MeasuringMask):
        output = attention_mask.attend(
            module, query, key, value, scaling, softcap, score_mod, scaled_part
        )
        return output, None
    if not isinstance(attention_mask, BlockMask):
        got = type(attention_mask).__name__
        raise AttentionError(
            f"flexmask attention needs a BlockMask, got {got}; pass attention_mask as a 2-D "
            "padding mask or not at all, or choose attn_implementation='sdpa'"
        )
    if isinstance(attention_mask, CausalRows):
        assert cache_slots is not None
        rows = _attend_causal_rows(
            module, query, key, value, cache_slots, scaling, softcap, key_table
        )
        return rows, None
    own_key = key
    if cache_slots is not None:
        key, value = _append_to_cache(module, key, value, cache_slots)
    elif stream is not None:
        key, value = _write_to_cache(module, key, value, stream)
        if ends_pass:
            raise KeysWritten
        # Tells the compiler that the number of tiles is the mask's, and no symbol of its own.
        assume(stream.queries.shape[0] == attention_mask.kv_num_blocks.numel())
        is_flat = attention_mask.kv_num_blocks.shape[0] == 1
        query, own_key = (_in_tiles(x, stream.queries, is_flat=is_flat) for x in (query, own_key))
    elif not key.is_cuda:
        # Phi-3's keys and values are views of one product; with symbolic lengths, flex's CPU
        # kernel reads such views wrongly (torch 2.13).
        key, value = key.contiguous(), value.contiguous()
    output = attend(
        query, key, value, attention_mask, scaling, softcap, score_mod, prefill_kernel,
        scaled_part, own_key,
    )  # fmt: skip
    if stream is not None:
        output = output.transpose(0, 1).flatten(1, 2)[None, :, stream.places]
    output = output.transpose(1, 2)
    if cache_slots is not None and not output.is_cuda:
        return kept_apart(output), None
    return output.contiguous(), None


def _in_tiles(x: Tensor, queries: Tensor, *, is_flat: bool) -> Tensor:
    """Gather tiles of a stream ``(1, H, T, D)``: ``(N, H, Q, D)``, or flat ``(1, H, N * Q, D)``.

    Flat ones get no new axis: FLASH's output has the query's strides, and it refuses those of a
    new axis, which are 0.
    """
    return x[:, :, queries.flatten()] if is_flat else x[0][:, queries].transpose(0, 1)


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | ProbeMask,
    scaling: float | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    scaled_part: PlacedPart | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend under a dense mask ``(B, 1, Q, K)`` with matrix products in float32: the reference.

    Arguments and result as in `flexmask_attention`; the mask is bool, or added to the scores.
    A query that sees nothing gets zeros.

    Raises:
        AttentionError: If the model asks for something that this backend does not compute.
    """
    _refuse_unsupported(module, kwargs)
    if isinstance(attention_mask, ProbeMask):
        return attention_mask.note(module, (query, key, value), softcap, None), None
    note_attention()
    check_lengths(query, key, tuple(attention_mask.shape[2:]))
    is_seen = seen_through(attention_mask)
    sizes = (*query.shape[:3], key.shape[2])
    weights = dense_weights(
        query,
        key,
        is_seen,
        index_axes(*(torch.arange(size, device=query.device) for size in sizes)),
        scaling=scaling,
        softcap=softcap,
        score_mod=score_mod,
        scaled_part=scaled_part,
    )
    values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).float()
    return (weights @ values).to(query.dtype).transpose(1, 2).contiguous(), None


KNOWN_ARGUMENTS = frozenset(
    {
        # The mask holds what they say.
        "is_causal", "sliding_window", "position_ids", "position_embeddings", "cache_position",
        # They concern the rest of the model.
        "use_cache", "return_dict", "output_hidden_states", "output_router_logits", "labels",
        "logits_to_keep", "num_items_in_batch", "deterministic",
        # `_refuse_unsupported` has checked their values.
        "dropout", "output_attentions",
    }
)  # fmt: skip
"""Other arguments that models pass to attention, and that change nothing here."""


def _refuse_unsupported(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse arguments that the backend does not implement, and all that it does not know."""
    name = type(module).__name__
    if (kwargs.get("dropout") or 0.0) > 0.0:
        raise AttentionError(
            f"{name} asks for attention dropout {kwargs['dropout']}, which flexmask does not "
            "compute; call model.eval(), or set attention_dropout=0.0"
        )
    if kwargs.get("output_attentions"):
        raise AttentionError(
            "output_attentions=True needs attention weights, which flexmask never makes; "
            "choose attn_implementation='eager'"
        )
    unknown = [
        key for key, value in kwargs.items() if key not in KNOWN_ARGUMENTS and value is not None
    ]
    if unknown:
        raise AttentionError(
            f"{name} asks for attention with {', '.join(sorted(unknown))}, which flexmask does "
            "not compute; choose another attn_implementation for this model"
        )


def _attend_causal_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    scaling: float | None,
    softcap: float | None,
    key_table: KeyTable | None,
) -> Tensor:
    """Write a key per row to the cache, and attend to all keys up to it: ``(B, 1, H, D_v)``."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    own = (query[:, :, 0], key[:, :, 0], value[:, :, 0])
    table = (None, None) if key_table is None else key_table
    rows: Tensor = torch.ops.flexmask.decode_attention(
        *own, None, None, *bound_cache(module), slots, scale, softcap or 0.0, *table
    )
    return rows[:, None]


def bound_cache(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the caches bound to an attention module, ``(H_kv, B, capacity, D)`` each."""
    return cast(Tensor, module.key_cache), cast(Tensor, module.value_cache)


def _append_to_cache(
    module: nn.Module, key: Tensor, value: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Write a key and value per row; return those of all slots, ``(B, H_kv, capacity, D)``."""
    key_cache, value_cache = bound_cache(module)
    count = len(slots)
    rows = torch.arange(count, device=key.device)
    key_cache[:, rows, slots] = key[:, :, 0].transpose(0, 1)
    value_cache[:, rows, slots] = value[:, :, 0].transpose(0, 1)
    return key_cache[:, :count].transpose(0, 1), value_cache[:, :count].transpose(0, 1)


def _write_to_cache(
    module: nn.Module, key: Tensor, value: Tensor, stream: TokenStream
) -> tuple[Tensor, Tensor]:
    """Write the keys and values of a stream; return those of all rows as one axis of keys."""
    key_cache, value_cache = bound_cache(module)
    capacity = key_cache.shape[2]
    # Not through a flat view of the cache, which inductor would copy as a whole.
    rows, slots = stream.slots // capacity, stream.slots % capacity
    key_cache[:, rows, slots] = key[0, :, stream.sources]
    value_cache[:, rows, slots] = value[0, :, stream.sources]
    return key_cache.flatten(1, 2)[None], value_cache.flatten(1, 2)[None]
