"""The compiled call of FlexAttention: order and padding of queries, and kernel options."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexmask.attention.model_block_mask import plain_indices
from flexmask.attention.scaled_part import PlacedPart, scaled_score_mod
from flexmask.errors import AttentionError
from flexmask.torch_internals import compile_settings

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import FlexKernelOptions

    from flexmask.mod_types import MaskMod, ScoreMod

PrefillKernel = Literal["triton", "flash"]

CPU_KEYS = 16
"""FlexAttention's CPU kernel gives wrong results for fewer than 128 keys that are an odd multiple
of 8, on processors with AVX2 and no AVX-512 (torch 2.13). A multiple of 16 is right everywhere."""

TRITON_OPTIONS = {
    (64, 32): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
    (64, 64): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    (128, 128): {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3, "USE_TMA": True},
}
"""For each tile the fastest of about forty settings on an H100 and an H200 (24 heads of 128,
bf16): for 1k tokens, for 4k to 16k, and for 64k."""


def has_triton_options(dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Return True if `TRITON_OPTIONS` apply; other heads use FlexAttention's own options."""
    return dtype.itemsize == 2 and max(key_dim, value_dim) <= 128


class TokenStream(NamedTuple):
    """The tokens of several batch rows as one stream, without padding between them.

    A kernel computes whole tiles of queries, each of one row, so queries are put into tiles for
    attention and back afterwards. Tiles with the most keys come first: started last, they would
    still run when all others have finished.

    Example:
        Two rows of 3 and 2 tokens are the stream ``a b c | d e``. In tiles of 2, with the tile of
        ``c`` first: queries ``c c | a b | d e``, and the tokens are at places 2 3 0 4 5.

    Attributes:
        sources: ``(W,)`` the token whose key and value are written to each of `slots`. A token
            that several rows begin with is computed once and written for each.
        slots: ``(W,)`` slots of the cache, counted over all rows.
        queries: ``(N, Q)`` the tokens of each tile; the last token of a row fills its tile.
        places: ``(T,)`` the place of each token, counted over all tiles.
    """

    sources: Tensor
    slots: Tensor
    queries: Tensor
    places: Tensor


def _joined_score_mod(softcap: float | None, score_mod: ScoreMod | None) -> ScoreMod | None:
    if softcap is None:
        return score_mod

    def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score = softcap * torch.tanh(score / softcap)
        return score if score_mod is None else score_mod(score, b, h, q_idx, kv_idx)

    return capped


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    softcap: float | None,
    score_mod: ScoreMod | None,
    prefill_kernel: PrefillKernel | None,
    scaled_part: PlacedPart | None,
    own_key: Tensor,
) -> Tensor:
    block_mask = BlockMask.from_kv_blocks(
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=_never_trivial(mask.mask_mod) if prefill_kernel == "flash" else mask.mask_mod,
        # From the tensors: a length read off the mask would be a constant of the graph.
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    heads, query = query.shape[1], _padded_groups(query, key.shape[1])

    def weigh(value: Tensor, score_mod: ScoreMod | None) -> Tensor:
        output = flex_attention(
            query,
            key,
            value,
            score_mod=score_mod,
            block_mask=block_mask,
            enable_gqa=heads != key.shape[1],
            scale=scaling,
            kernel_options=_kernel_options(query, value, mask, prefill_kernel),
        )
        assert isinstance(output, Tensor)
        return output

    score_mod = _joined_score_mod(softcap, score_mod)
    if scaled_part is not None:
        score_mod = scaled_score_mod(scaled_part, score_mod, query, key, own_key, scaling, weigh)
    return _without_padding(weigh(value, score_mod), heads, key.shape[1])


def _never_trivial(mask_mod: MaskMod) -> MaskMod:
    """Return an equal mask_mod that inductor does not reduce to a constant.

    Under a mask_mod that is constantly true, FLASH ignores which tiles are empty and attends to
    all keys (https://github.com/pytorch/pytorch/issues/188322, torch up to 2.13).
    """

    def never_trivial(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx, kv_idx) & (kv_idx >= 0)

    return never_trivial


def _kernel_options(
    query: Tensor, value: Tensor, mask: BlockMask, prefill_kernel: PrefillKernel | None
) -> FlexKernelOptions | None:
    """Return FlexAttention's options for a prefill whose lengths are multiples of the tile."""
    if prefill_kernel is None:
        return None
    if prefill_kernel == "flash":
        return {"BACKEND": "FLASH"}
    # Inductor cannot derive this from symbolic lengths, and would bounds-check every load.
    options: dict[str, Any] = {"IS_DIVISIBLE": True}
    if has_triton_options(query.dtype, query.shape[-1], value.shape[-1]):
        options |= TRITON_OPTIONS[mask.BLOCK_SIZE]
    return cast("FlexKernelOptions", options)


def _padded_groups(query: Tensor, kv_heads: int) -> Tensor:
    """Pad the query heads of each key head to a power of two, for one query on CUDA.

    FlexAttention's decode kernel takes no other number of heads, and its prefill kernel takes ten
    times as long for a single query (24 heads over 8, 16k keys, H200).
    """
    batch_size, heads, length, dim = query.shape
    group = heads // kv_heads
    if length > 1 or query.device.type != "cuda" or group & (group - 1) == 0:
        return query
    groups = query.reshape(batch_size, kv_heads, group, length, dim)
    padded: Tensor = nn.functional.pad(groups, (0, 0, 0, 0, 0, (1 << group.bit_length()) - group))
    return padded.flatten(1, 2)


def _without_padding(output: Tensor, heads: int, kv_heads: int) -> Tensor:
    if output.shape[1] == heads:
        return output
    batch_size, _, length, dim = output.shape
    groups = output.view(batch_size, kv_heads, -1, length, dim)
    return groups[:, :, : heads // kv_heads].flatten(1, 2)


@cache
def _compiled_attend() -> Callable[..., Tensor]:
    return torch.compile(_attend, fullgraph=True, dynamic=True)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *options: Any) -> Tensor:
    """Call `_attend`: compiled, or within the graph that is being compiled.

    Within a graph on a CPU, the number of keys is a multiple of `CPU_KEYS`.
    """
    if torch.compiler.is_compiling():
        return _attend(query, key, value, mask, *options)
    check_lengths(query, key, mask.seq_lengths)
    if not key.is_cuda and torch.is_grad_enabled() and query.requires_grad:
        raise AttentionError(
            "FlexAttention computes no gradients on a CPU; run the model under torch.no_grad()"
        )
    if not key.is_cuda and key.shape[2] % CPU_KEYS:
        key, value, mask = _with_whole_vectors(key, value, mask)
    with compile_settings(query.device):
        return _compiled_attend()(query, key, value, mask, *options)


def check_lengths(query: Tensor, key: Tensor, masked: tuple[int, ...]) -> None:
    """Check that a mask has as many queries and keys as the model attends with.

    Args:
        query: ``(B, H, Q, D)``.
        key: ``(B, H_kv, K, D)``.
        masked: Number of queries and of keys of the mask.

    Raises:
        AttentionError: If they differ.
    """
    lengths = (query.shape[2], key.shape[2])
    if masked != lengths:
        raise AttentionError(
            f"the model attends with {lengths[0]} queries to {lengths[1]} keys under a mask made "
            f"for {masked[0]} and {masked[1]}; flexmask cannot mask it"
        )


def _with_whole_vectors(
    key: Tensor, value: Tensor, mask: BlockMask
) -> tuple[Tensor, Tensor, BlockMask]:
    """Pad keys and values to a multiple of `CPU_KEYS`, and hide the padding from all queries."""
    missing = -key.shape[2] % CPU_KEYS
    last = torch.tensor(key.shape[2] - 1)  # A tensor: a new captured number would compile again.
    mask_mod = mask.mask_mod

    def of_real_keys(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx, torch.minimum(kv_idx, last)) & (kv_idx <= last)

    padded = BlockMask.from_kv_blocks(
        *plain_indices(mask),
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=of_real_keys,
        seq_lengths=(mask.seq_lengths[0], mask.seq_lengths[1] + missing),
        compute_q_blocks=False,
    )
    padding = (0, 0, 0, missing)
    return nn.functional.pad(key, padding), nn.functional.pad(value, padding), padded
