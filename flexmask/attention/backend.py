"""The attention backend ``flexmask``, registered with transformers.

A model loaded with ``attn_implementation="flexmask"`` computes its attention here, through
compiled FlexAttention and a BlockMask; no method of it is replaced. ``flexmask_dense`` is the
reference: the same masks as dense tensors and plain matrix products, chosen by name only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.fx.experimental import _config as shape_config
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from flexmask.attention.scaled_part import PlacedPart, scaled_score_mod
from flexmask.errors import AttentionError
from flexmask.kernels.decode_attention import KeyTable
from flexmask.kernels.few_rows import kept_apart

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import FlexKernelOptions

    from flexmask.strategy import ScoreMod

BACKEND = "flexmask"
DENSE_BACKEND = "flexmask_dense"


PrefillKernel = Literal["triton", "flash"]

TRITON_OPTIONS = {
    (64, 32): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
    (64, 64): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    (128, 128): {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3, "USE_TMA": True},
}
"""By tile, the fastest of about forty settings on an H100 and an H200 (24 heads of 128, bf16): for
1k tokens, for 4k to 16k, and for 64k."""


def has_triton_options(dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether `TRITON_OPTIONS` suit heads like these; for others FlexAttention has its own."""
    return dtype.itemsize == 2 and max(key_dim, value_dim) <= 128


class CausalRows(BlockMask):
    """The mask of a decode step in which each query sees every slot up to its own.

    It takes the place of a BlockMask of the same content, whose tiles are then not read: a
    kernel made for this case attends.
    """


@contextmanager
def compile_settings(device: torch.device) -> Iterator[None]:
    """Torch's settings for compiled attention on a device, for the duration of a call.

    Every model shape and mask compiles once, and dynamo's limit of 8 is for code that should
    not have compiled again. Numbers that a mask_mod or score_mod captures are constants: flex
    refuses symbolic floats. Lengths of queries and keys that happen to be equal at first are
    not equal for ever; but torch before 2.13 gives two sizes of one C++ kernel the same name
    where equal ones have symbols of their own.
    """
    has_symbol_each = device.type == "cuda" or torch.__version__ >= "2.13"
    with (
        dynamo_config.patch(recompile_limit=256, specialize_float=True, specialize_int=True),
        cast(Any, shape_config).patch(use_duck_shape=not has_symbol_each),
    ):
        yield


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
    prefill_kernel: PrefillKernel | None = None,
    score_mod: ScoreMod | None = None,
    scaled_part: PlacedPart | None = None,
    key_table: KeyTable | None = None,
    attention_probe: AttentionProbe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend under a BlockMask.

    Args:
        module: The attention module that calls; holds the key and value caches if bound.
        query: ``(B, H, Q, D)``.
        key: ``(B, H_kv, K, D)``, with ``H`` a multiple of ``H_kv``.
        value: ``(B, H_kv, K, D_v)``.
        attention_mask: Who sees whom, for ``Q`` queries and ``K`` keys; where a cache is bound,
            its first slots are the keys.
        scaling: Factor on the scores; default ``D ** -0.5``.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        cache_slots: Slots that keys and values go to in ``module.key_cache`` and
            ``module.value_cache``: ``(B, Q)``, where the mask may have tiles for more queries, or
            ``(B,)`` for one query per row.
        prefill_kernel: What computes a prefill whose lengths are whole tiles.
        score_mod: Changes scores, after scaling and capping.
        scaled_part: Keys whose log-sum-exp is scaled, after that.
        key_table: Where the keys of rows lie that see all of them, each once.
        attention_probe: Given, notes the module and nothing is computed.
        kwargs: What else transformers passes; refused where it changes attention.

    Returns:
        ``(B, Q, H, D_v)`` and no weights.

    Raises:
        AttentionError: If the model asks for what this backend does not compute.
    """
    _refuse_unsupported(module, kwargs)
    if attention_probe is not None:
        return attention_probe.record(module, query, key, value, softcap), None
    if not isinstance(attention_mask, BlockMask):
        got = type(attention_mask).__name__
        raise AttentionError(
            f"flexmask attention needs a BlockMask, got {got}; pass attention_mask as a 2-D "
            "padding mask or not at all, or choose attn_implementation='sdpa'"
        )
    if isinstance(attention_mask, CausalRows):
        assert cache_slots is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        own = (query[:, :, 0], key[:, :, 0], value[:, :, 0])
        table = (None, None) if key_table is None else key_table
        rows = torch.ops.flexmask.decode_attention(
            *own, None, None, *bound_cache(module), cache_slots, scale, softcap or 0.0, *table
        )
        return rows[:, None], None
    own_key, length = key, query.shape[2]
    is_prefill = cache_slots is not None and cache_slots.dim() == 2
    if cache_slots is not None:
        key, value = _update_cache(module, key, value, cache_slots, attention_mask)
    if is_prefill:
        num_queries = attention_mask.kv_num_blocks.shape[-1] * attention_mask.BLOCK_SIZE[0]
        query, own_key = (_first_queries(x, num_queries) for x in (query, own_key))
    attend = _attend if torch.compiler.is_compiling() else _attend_compiled
    output = attend(
        query, key, value, attention_mask, scaling, softcap, score_mod, prefill_kernel,
        scaled_part, own_key,
    )  # fmt: skip
    if is_prefill:
        output = _first_queries(output, length)
    output = output.transpose(1, 2)
    if cache_slots is not None and cache_slots.dim() == 1 and not output.is_cuda:
        return kept_apart(output), None
    return output.contiguous(), None


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    scaled_part: PlacedPart | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend under a dense boolean mask ``(B, 1, Q, K)`` in float32, the slow and plain way.

    Arguments and result as in `flexmask_attention`. A query that sees nothing gets zeros.
    """
    _refuse_unsupported(module, kwargs)
    groups = query.shape[1] // key.shape[1]
    keys = key.repeat_interleave(groups, dim=1).float()
    values = value.repeat_interleave(groups, dim=1).float()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query.float() @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    axes = [torch.arange(size, device=scores.device) for size in scores.shape]
    b, h, q_idx, kv_idx = (axis.view(-1, *[1] * (3 - n)) for n, axis in enumerate(axes))
    if score_mod is not None:
        scores = score_mod(scores, b, h, q_idx, kv_idx)
    if scaled_part is not None:
        in_part = scaled_part.holds(b, q_idx, kv_idx) & attention_mask
        sums = scores.masked_fill(~in_part, float("-inf")).logsumexp(-1, keepdim=True)
        scores = torch.where(in_part, scores + (scaled_part.part.scale - 1) * sums, scores)
    weights = scores.masked_fill(~attention_mask, float("-inf")).softmax(-1).nan_to_num()
    return (weights @ values).to(query.dtype).transpose(1, 2).contiguous(), None


def _refuse_unsupported(module: nn.Module, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if kwargs.get("dropout", 0.0) > 0.0:
        raise AttentionError(
            f"{name} asks for attention dropout {kwargs['dropout']}, which flexmask does not "
            "compute; call model.eval(), or set attention_dropout=0.0"
        )
    for option in ("s_aux", "position_bias", "head_mask"):
        if kwargs.get(option) is not None:
            raise AttentionError(
                f"{name} asks for {option}, which flexmask does not compute; "
                "choose another attn_implementation for this model"
            )
    if kwargs.get("output_attentions"):
        raise AttentionError(
            "output_attentions=True needs attention weights, which flexmask never makes; "
            "choose attn_implementation='eager'"
        )


def bound_cache(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Keys and values bound to an attention module, ``(B, H_kv, capacity, D)`` each."""
    return cast(Tensor, module.key_cache), cast(Tensor, module.value_cache)


def _update_cache(
    module: nn.Module, key: Tensor, value: Tensor, slots: Tensor, mask: BlockMask
) -> tuple[Tensor, Tensor]:
    """Write keys and values to the cache; return the first slots of it that the mask covers."""
    key_cache, value_cache = bound_cache(module)
    rows = torch.arange(key.shape[0], device=key.device)
    if slots.dim() == 1:
        key_cache[rows, :, slots] = key[:, :, 0]
        value_cache[rows, :, slots] = value[:, :, 0]
        return key_cache, value_cache
    # Not through a transposed view of the cache, which inductor would copy there and back.
    key_cache[rows[:, None], :, slots] = key.transpose(1, 2)
    value_cache[rows[:, None], :, slots] = value.transpose(1, 2)
    length = mask.kv_indices.shape[-1] * mask.BLOCK_SIZE[1]
    count = key.shape[0]
    return key_cache[:count, :, :length], value_cache[:count, :, :length]


def _first_queries(x: Tensor, count: int) -> Tensor:
    """The first ``count`` queries of ``(B, H, Q, D)``; past the end, the last one again.

    By an index: a slice or padding would be another graph where it leaves the tensor as it is.
    """
    return x[:, :, torch.arange(count, device=x.device).clamp(max=x.shape[2] - 1)]


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
        mask_mod=mask.mask_mod,
        # From the tensors: a length read off the mask would be a constant of the graph.
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    heads, query = query.shape[1], _padded_groups(query, key.shape[1])
    if not key.is_cuda:
        # Phi-3's keys and values are views of one product; with symbolic lengths, flex's CPU
        # kernel reads such views wrongly (torch 2.13).
        key, value = key.contiguous(), value.contiguous()

    def attend(value: Tensor, score_mod: ScoreMod | None) -> Tensor:
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
        score_mod = scaled_score_mod(scaled_part, score_mod, query, key, own_key, scaling, attend)
    return _without_padding(attend(value, score_mod), heads, key.shape[1])


def _kernel_options(
    query: Tensor, value: Tensor, mask: BlockMask, prefill_kernel: PrefillKernel | None
) -> FlexKernelOptions | None:
    """Options of FlexAttention for a prefill whose lengths are whole tiles."""
    if prefill_kernel is None:
        return None
    if prefill_kernel == "flash":
        return {"BACKEND": "FLASH"}
    # Under symbolic lengths inductor cannot know it, and checks every load against the end.
    options: dict[str, Any] = {"IS_DIVISIBLE": True}
    if has_triton_options(query.dtype, query.shape[-1], value.shape[-1]):
        options |= TRITON_OPTIONS[mask.BLOCK_SIZE]
    return cast("FlexKernelOptions", options)


def _padded_groups(query: Tensor, kv_heads: int) -> Tensor:
    """Pad the query heads of each key head to a power of two, for one query on CUDA.

    FlexAttention's decode kernel takes no other number; its prefill kernel needs ten times as
    long for a single query (24 heads over 8, 16k keys, H200).
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


def _attend_compiled(*args: Any) -> Tensor:
    with compile_settings(args[0].device):
        return _compiled_attend()(*args)


@dataclass(frozen=True)
class AttentionShape:
    """What one attention module of a model needs of a cache."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    has_softcap: bool


class AttentionProbe:
    """Passed through a model's forward, notes which modules attend and in which shapes."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.shapes: dict[nn.Module, AttentionShape] = {}

    def record(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        softcap: float | None,
    ) -> Tensor:
        """Note ``module``'s shapes; return zeros in place of attention's result."""
        has_softcap = softcap is not None
        shape = AttentionShape(key.shape[1], key.shape[3], value.shape[3], has_softcap)
        self.shapes[module] = shape
        batch_size, heads, length, _ = query.shape
        return value.new_zeros(batch_size, length, heads, value.shape[3])


def find_attention_modules(model: nn.Module) -> dict[nn.Module, AttentionShape]:
    """Find the modules that attend through this backend, by running one token.

    No name or attribute of a model is relied on.

    Raises:
        AttentionError: If none does.
    """
    device = next(model.parameters()).device
    probe = AttentionProbe()
    input_ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False, attention_probe=probe)
    if not probe.shapes:
        raise AttentionError(
            f"{type(model).__name__} does not attend through flexmask; "
            "load it with attn_implementation='flexmask'"
        )
    return probe.shapes
