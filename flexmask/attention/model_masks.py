"""The mask functions that transformers calls for each forward pass of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexmask.attention.added_mask import added_mask
from flexmask.attention.model_block_mask import ModelBlockMask, plain_indices
from flexmask.attention.model_probe import probe_mask
from flexmask.attention.strategy_context import ActiveStrategy, active_strategy
from flexmask.block_mask import create_block_mask
from flexmask.errors import AttentionError
from flexmask.mask_mods import and_masks, within_window
from flexmask.torch_internals import mark_static

if TYPE_CHECKING:
    from flexmask.mod_types import MaskMod


def model_block_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> ModelBlockMask | Tensor:
    """Build the BlockMask of one forward pass.

    Inside `flexmask.use_strategy` it is the strategy's mask, elsewhere the model's own.

    Args:
        batch_size: Rows.
        q_length: Queries in this pass.
        kv_length: Keys, including cached ones.
        q_offset: Slot of the first query.
        kv_offset: Slot of the first key, if a sliding-window cache has dropped earlier keys.
        mask_function: The model's own mask_mod over slots.
        attention_mask: ``(B, slots)``; false for padding.
        device: Device of the mask.
        kwargs: Other arguments of transformers.

    Returns:
        A BlockMask; in a probing pass the mask of the probe.

    Raises:
        AttentionError: If the strategy cannot be combined with the model's cache or layers.
    """
    if (probing := probe_mask(mask_function, device, kwargs)) is not None:
        return probing
    mask_mod = _mask_over_slots(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        device, kwargs,
    )  # fmt: skip
    mask = create_block_mask(
        mask_mod, batch_size, None, q_length, kv_length, device, pointwise_only=True
    )
    return ModelBlockMask.from_kv_blocks(
        *plain_indices(mask),
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=(q_length, kv_length),
        compute_q_blocks=False,
    )


def model_dense_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | ModelBlockMask:
    """Build the same mask as `model_block_mask`, as a tensor ``(B, 1, Q, K)`` to add to scores."""
    if (probing := probe_mask(mask_function, device, kwargs)) is not None:
        return probing
    mask_mod = _mask_over_slots(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        device, kwargs,
    )  # fmt: skip
    rows = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    head = torch.zeros((), dtype=torch.long, device=device)
    queries = torch.arange(q_length, device=device).view(-1, 1)
    keys = torch.arange(kv_length, device=device)
    is_seen = mask_mod(rows, head, queries, keys).expand(batch_size, 1, q_length, kv_length)
    if (active := active_strategy()) is not None:
        active.note_dense_mask()
    return added_mask(is_seen, kwargs.get("dtype", torch.float32))


def _mask_over_slots(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any] | None,
    attention_mask: Tensor | None,
    device: torch.device | str,
    kwargs: dict[str, Any],
) -> MaskMod:
    capacity = _bucket(max(kv_length + kv_offset, _slots(attention_mask)))
    active = active_strategy()
    if active is not None:
        active.check_batch_size(batch_size)
        mask_mod = _strategy_mask(active, capacity, kv_offset, kwargs)
    elif mask_function is not None:
        mask_mod = mask_function
    else:
        raise AttentionError("the model gave no mask function; flexmask needs one")
    is_token = torch.ones(batch_size, capacity, dtype=torch.bool, device=device)
    if attention_mask is not None:
        is_token[:, : attention_mask.shape[1]] = attention_mask.to(device=device, dtype=torch.bool)
        is_token[:, attention_mask.shape[1] :] = False
    return _shifted(mask_mod, is_token, _offsets(q_offset, kv_offset, device))


def _strategy_mask(
    active: ActiveStrategy, capacity: int, kv_offset: int, kwargs: dict[str, Any]
) -> MaskMod:
    config, window = kwargs.get("config"), kwargs.get("local_size")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise AttentionError("strategies do not combine with chunked attention layers")
    if kv_offset and not active.is_sequential:
        raise AttentionError(
            "a sliding-window cache has dropped keys that restarted positions still reach; "
            "use flexmask.Engine, or the strategy with positions=sequential"
        )
    if kv_offset and window is None:
        raise AttentionError(
            "the model's cache has dropped keys that a layer without a window still sees; use "
            "flexmask.Engine"
        )
    batch = active.batch(capacity)
    mask_mod = active.strategy.mask_mod(batch)
    return mask_mod if window is None else and_masks(mask_mod, within_window(batch, window))


def _shifted(mask_mod: MaskMod, is_token: Tensor, offsets: Tensor) -> MaskMod:
    # Offsets are a tensor, and the length of is_token is a power of two, so that new values
    # compile nothing. Their sizes must not be symbolic (see LayoutBatch).
    mark_static(is_token)
    mark_static(offsets)

    def shifted(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q_slot, kv_slot = q_idx + offsets[0], kv_idx + offsets[1]
        return mask_mod(b, h, q_slot, kv_slot) & is_token[b, kv_slot]

    return shifted


def _offsets(q_offset: int | Tensor, kv_offset: int, device: torch.device | str) -> Tensor:
    offsets = torch.zeros(2, dtype=torch.long, device=device)
    offsets[0] = q_offset
    offsets[1] = kv_offset
    return offsets


def _slots(attention_mask: Tensor | None) -> int:
    return 0 if attention_mask is None else attention_mask.shape[1]


def _bucket(length: int) -> int:
    return max(256, 1 << (length - 1).bit_length())
