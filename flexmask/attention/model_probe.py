"""Probes a model: runs a few tokens through it to find how it attends.

The probe relies on no name or attribute of the model's modules. In a probing pass, attention
records its caller and returns zeros, so a token's queries, keys and values depend only on its id
and its position. If they differ for two tokens with the same id and position, the model mixes
tokens by other means than attention, assigns positions itself, or lets the rows of a batch change
each other's rotary embeddings. A mask cannot isolate segments in such a model.

In a model that masks scores in code of its own, attention cannot be replaced by zeros. There each
token sees only itself, and the outputs of tokens are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexmask.attention import BACKEND, DENSE_BACKEND
from flexmask.attention.added_mask import OwnScoresError, added_mask
from flexmask.attention.model_block_mask import ModelBlockMask
from flexmask.error_text import described
from flexmask.errors import AttentionError, FlexMaskError, ModelError
from flexmask.transformers_internals import attention_implementation, is_stateful

TOKEN_IDS = ((3, 4, 5, 6), (7, 8, 9, 6))
"""Two rows that end with the same token at the same position."""

PLACED_IDS = ((3, 3, 4, 6), (7, 8, 9, 6))
PLACED_AT = (0, 0, 1, 3)
"""Tokens of the first row, the first of them twice, at positions passed as `position_ids`."""

MOVED = (2, 0, 3, 1)
"""Another storage order: the distance of each pair of tokens changes, and half the directions."""

TOLERANCE = 1e-4
"""Largest difference relative to the largest magnitude; more for coarser dtypes."""

WHOLE_MODEL = "attention"
"""The type of all layers, for a model that takes a single mask."""

ROTATIONS_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the longest row above some length."""


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of the key-value cache that one attention module needs."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    has_softcap: bool


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention in a probing pass.

    Attributes:
        module: The attention module.
        tensors: Query, key and value, ``(B, H, T, D)`` each.
        has_softcap: Whether scores are capped.
        mask: The mask that it was called with.
        cache_slots: The `cache_slots` that attention was given.
    """

    module: nn.Module
    tensors: tuple[Tensor, Tensor, Tensor]
    has_softcap: bool
    mask: ProbeMask
    cache_slots: Tensor | None

    @property
    def shape(self) -> AttentionShape:
        """The sizes of the key-value cache that the module needs."""
        _, key, value = self.tensors
        return AttentionShape(key.shape[1], key.shape[3], value.shape[3], self.has_softcap)


class ProbeMask(ModelBlockMask):
    """The mask of a probing pass: attention records its calls here and computes nothing."""

    calls: list[AttentionCall]
    mask_function: Callable[..., Any] | None
    window: int | None

    @classmethod
    def for_pass(
        cls,
        calls: list[AttentionCall],
        *,
        mask_function: Callable[..., Any] | None = None,
        window: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Make a mask.

        Args:
            calls: The list to which calls are appended.
            mask_function: The model's own mask_mod, if it asked for this mask.
            window: The sliding window or chunk size that it passed with it.
            device: Device of its tensors.
        """
        rows, length = len(TOKEN_IDS), len(TOKEN_IDS[0])
        none = torch.zeros(rows, 1, 1, 1, dtype=torch.int32, device=device)
        mask = cls.from_kv_blocks(
            none[..., 0], none, seq_lengths=(length, length), compute_q_blocks=False
        )
        mask.calls, mask.mask_function, mask.window = calls, mask_function, window
        return mask

    def note(
        self,
        module: nn.Module,
        tensors: tuple[Tensor, Tensor, Tensor],
        softcap: float | None,
        cache_slots: Tensor | None,
    ) -> Tensor:
        """Record a call; return zeros ``(B, T, H, D_v)`` in place of attention's result."""
        self.calls.append(AttentionCall(module, tensors, softcap is not None, self, cache_slots))
        query, _, value = tensors
        rows, heads, length, _ = query.shape
        return value.new_zeros(rows, length, heads, value.shape[3])


@dataclass
class _Pass:
    """One probing pass.

    Attributes:
        is_seen: Which slots each slot sees, ``(B, T, T)``; None if attention returns zeros.
        calls: The recorded calls of attention.
        masks: The masks that the model asked for.
        output: Logits, or the last hidden states of a model without: ``(B, T, D)``.
    """

    is_seen: Tensor | None = None
    calls: list[AttentionCall] = field(default_factory=list)
    masks: list[ProbeMask] = field(default_factory=list)
    output: Tensor | None = None

    def token_tensors(self) -> list[Tensor]:
        """The tensors that depend only on a token's id and position, ``(B, H, T, D)`` each."""
        if self.is_seen is None:
            return [tensor for call in self.calls for tensor in call.tensors]
        assert self.output is not None
        return [self.output[:, None]]


_pass: ContextVar[_Pass | None] = ContextVar("flexmask_probing_pass", default=None)


def probe_mask(
    mask_function: Callable[..., Any] | None, device: torch.device | str, options: dict[str, Any]
) -> ProbeMask | Tensor | None:
    """Return the mask for a model that asks for one in a probing pass; None in any other pass.

    Returns:
        A mask under which attention returns zeros, or, for models that mask scores themselves,
        one to add to scores, ``(B, 1, T, T)``.
    """
    current = _pass.get()
    if current is None:
        return None
    window = options.get("local_size")
    mask = ProbeMask.for_pass(
        current.calls, mask_function=mask_function, window=window, device=device
    )
    current.masks.append(mask)
    if current.is_seen is None:
        return mask
    dtype = options.get("dtype", torch.float32)
    return added_mask(current.is_seen[:, None].to(device), dtype)


@dataclass(frozen=True)
class ModelProbe:
    """The result of probing a model; `probe_model` creates it.

    Attributes:
        model: The model.
        windows: Sliding window of each attention module, in the order of their calls; None for
            full attention.
        calls_per_pass: How often each module attends in one pass.
        shapes: The sizes of each module's key-value cache.
        rotation_limit: Length above which the longest row of a batch changes the rotary
            embeddings of all rows; None if there is no such length.
        has_own_scores: Whether the model masks scores in code of its own. Nothing is known about
            its attention modules then.
    """

    model: PreTrainedModel
    windows: Mapping[nn.Module, int | None]
    calls_per_pass: Mapping[nn.Module, int]
    shapes: Mapping[nn.Module, AttentionShape]
    rotation_limit: int | None
    has_own_scores: bool

    @property
    def context(self) -> int | None:
        """The number of positions for a prompt and its generated tokens; None for no limit."""
        own = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min((n for n in (own, self.rotation_limit) if n is not None), default=None)

    def attends_again(self) -> list[str]:
        """Return the class names of modules that attend more than once in a pass."""
        counts = self.calls_per_pass.items()
        return sorted({type(module).__name__ for module, count in counts if count > 1})

    def windows_by_layer_type(self) -> dict[str, int | None]:
        """Return the sliding window of each type of layer for which the model takes a mask.

        Returns:
            The window by type of layer; by `WHOLE_MODEL` if the model takes one mask for all.

        Raises:
            AttentionError: If the masks do not reach the layers of their types, or the model does
                not pass keyword arguments on to attention.
        """
        name, calls = type(self.model).__name__, list[AttentionCall]()
        if self.has_own_scores:
            raise AttentionError(
                f"{name} masks scores in code of its own, which no attention backend replaces; "
                "the engine cannot run it, use flexmask.use_strategy with model.generate"
            )
        types = getattr(self.model.config.get_text_config(), "layer_types", None)
        device = self.model.device
        masks = {
            kind: ProbeMask.for_pass(calls, device=device)
            for kind in sorted(set(types or [WHOLE_MODEL]))
        }
        slots = torch.zeros(len(TOKEN_IDS), len(TOKEN_IDS[0]), dtype=torch.long, device=device)
        given = masks.get(WHOLE_MODEL, masks)
        found = _run(
            self.model,
            PLACED_IDS,
            position_ids=torch.tensor([PLACED_AT] * len(PLACED_IDS), device=device),
            attention_mask=given,
            cache_slots=slots,
        )
        if found.calls or [call.module for call in calls] != list(self._in_order()):
            raise AttentionError(
                f"{name} does not take the masks that it is given; the engine cannot run it"
            )
        if any(call.cache_slots is not slots for call in calls):
            raise AttentionError(
                f"{name} does not pass keyword arguments on to attention; the engine cannot run it"
            )
        windows = dict[str, int | None]()
        for kind, mask in masks.items():
            own = {self.windows[call.module] for call in calls if call.mask is mask}
            if len(own) > 1:
                raise AttentionError(
                    f"layers of {name} that take one mask have windows of their own: "
                    f"{', '.join(sorted(map(str, own)))}; the engine cannot run it"
                )
            windows[kind] = next(iter(own), None)
        return windows

    def _in_order(self) -> Iterator[nn.Module]:
        for module, count in self.calls_per_pass.items():
            yield from [module] * count


def probe_model(model: PreTrainedModel) -> ModelProbe:
    """Run a few tokens through a model, and refuse it if a mask cannot isolate its segments.

    Raises:
        AttentionError: If it does not attend through flexmask, or mixes or places tokens in ways
            that no mask controls.
        ModelError: If it computes NaN or infinity for every token.
    """
    name, has_own_scores = type(model).__name__, False
    implementation = attention_implementation(model.config.get_text_config())
    try:
        plain = _run(model, TOKEN_IDS)
    except OwnScoresError:
        has_own_scores = True
        plain = _run(model, TOKEN_IDS, _alone(model))
    if not plain.calls and not has_own_scores:
        reason = "computes attention in code of its own, which no attention backend replaces"
        if implementation not in (BACKEND, DENSE_BACKEND):
            if model.is_backend_compatible():
                reason = (
                    f"attends by {implementation!r}; load it with attn_implementation={BACKEND!r}"
                )
            else:
                reason += "; `flexmask doctor --model` tells whether it can be masked"
        raise AttentionError(f"{name} {reason}")
    _check_finite(name, plain)
    if is_stateful(model) or not _last_tokens_agree(plain):
        raise AttentionError(
            f"{name} mixes tokens by other means than attention (a recurrent state, a convolution)"
            ", which no mask controls"
        )
    counts = dict[nn.Module, int]()
    masks = plain.masks if has_own_scores else [call.mask for call in plain.calls]
    for mask in {id(mask): mask for mask in masks}.values():
        _check_mask(name, mask)
    for call in plain.calls:
        counts[call.module] = counts.get(call.module, 0) + 1
    config = model.config.get_text_config()
    limit = rotation_limit(config)
    _check_positions(model, plain, limit or getattr(config, "max_position_embeddings", None))
    if has_own_scores:
        _check_own_scores(model, plain)
        if implementation != DENSE_BACKEND:
            raise AttentionError(
                f"{name} masks scores in code of its own, which no attention backend replaces; "
                "for flexmask.use_strategy with model.generate, load it with "
                f"attn_implementation={DENSE_BACKEND!r}, which gives it a tensor to mask by"
            )
    return ModelProbe(
        model,
        windows={call.module: call.mask.window for call in plain.calls},
        calls_per_pass=counts,
        shapes={call.module: call.shape for call in plain.calls},
        rotation_limit=limit,
        has_own_scores=has_own_scores,
    )


def attention_calls(
    model: PreTrainedModel,
    token_ids: tuple[tuple[int, ...], ...],
    position_ids: tuple[tuple[int, ...], ...],
) -> list[AttentionCall]:
    """Run two rows of four tokens, with attention that returns zeros, and return its calls.

    Args:
        model: A model that attends through flexmask.
        token_ids: The tokens of each row.
        position_ids: Their positions.

    Raises:
        AttentionError: If the model's code fails.
    """
    positions = torch.tensor(position_ids, device=model.device)
    return _run(model, token_ids, position_ids=positions).calls


def rotation_limit(config: PreTrainedConfig) -> int | None:
    """Return the length above which the longest row changes the rotary embeddings of all rows."""
    lengths = []
    for rotation in rotations(config):
        if rotation.get("rope_type") in ROTATIONS_BY_LENGTH:
            original = rotation.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            lengths.append(original or config.max_position_embeddings)
    return min(lengths, default=None)


def rotations(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the rotary embeddings of a config: one, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _check_finite(name: str, found: _Pass) -> None:
    """Check that queries, keys and values of the first layer are finite for some token.

    A kernel may ignore scores that are NaN, and generated tokens would then not show the fault.

    Raises:
        ModelError: If they are not, as when a config divides positions by zero.
    """
    tensors = found.calls[0].tensors if found.calls else ()  # of scores of its own, none is seen
    for tensor in tensors:
        if not tensor.isfinite().all(-1).all(1).any():
            raise ModelError(
                f"{name} computes NaN or infinity for every token; its weights or its config.json "
                "are damaged"
            )


def _check_mask(name: str, mask: ProbeMask) -> None:
    """Check that the mask a model asks for is causal, with or without a sliding window.

    Raises:
        AttentionError: If it is another mask.
    """
    if mask.mask_function is None:
        raise AttentionError(f"{name} asks for a mask without saying which")
    # The first pairs of queries and keys, and those around the window's edge.
    window, device = mask.window, mask.kv_indices.device
    near = torch.arange(3) if window is None else torch.tensor([0, 1, window - 1, window])
    slots = torch.cat((near, near + 2 * (window or 0) + 1)).unique().to(device)
    query, key = slots[:, None].expand(-1, len(slots)), slots.expand(len(slots), -1)
    zero = torch.zeros((), dtype=torch.long, device=device)
    causal = key <= query
    expected = causal if window is None else causal & (key > query - window)
    seen = mask.mask_function(zero, zero, query, key)
    if torch.equal(seen, expected):
        return
    if bool((seen & ~causal).any()):
        raise AttentionError(
            f"{name} lets tokens see later ones; strategies are for decoders (is_decoder=True), "
            "whose tokens see only what is before them"
        )
    raise AttentionError(
        f"{name} has layers that attend in chunks or another pattern of their own, with which "
        "strategies do not combine"
    )


def _check_positions(model: PreTrainedModel, plain: _Pass, length: int | None) -> None:
    """Check that `position_ids` alone determine positions, whatever the other rows are.

    Raises:
        AttentionError: If not.
    """
    name, far = type(model).__name__, (length or 4096) - 1
    near, beside_far = (
        _run(
            model,
            PLACED_IDS,
            plain.is_seen,
            position_ids=torch.tensor([PLACED_AT, other], device=model.device),
        )
        for other in (PLACED_AT, (far,) * len(PLACED_AT))
    )
    if not _same_tokens(near, (0,), near, (1,)):
        raise AttentionError(
            f"{name} numbers tokens by itself and does not follow position_ids, which strategies "
            "set"
        )
    if not _same_tokens(plain, (0, 1, 3), near, (0, 2, 3)):
        raise AttentionError(f"{name} does not number positions from 0, as strategies do")
    slots = range(len(PLACED_AT))
    if not _same_tokens(near, slots, beside_far, slots):
        raise AttentionError(
            f"the length of other rows changes the rotary embeddings of a row in {name}, so that "
            "its tokens would depend on its batch"
        )


def _check_own_scores(model: PreTrainedModel, alone: _Pass) -> None:
    """Check that only the mask decides what tokens see in a model that masks scores itself.

    In the first row tokens see those before them, in the second only themselves. Then the same
    tokens are stored in the order `MOVED`, which changes the result if the model hides or weighs
    keys by slot.

    Args:
        model: The model.
        alone: Its pass over `TOKEN_IDS` in which each token sees only itself.

    Raises:
        AttentionError: If not.
    """
    name, slots = type(model).__name__, torch.arange(len(TOKEN_IDS[0]), device=model.device)
    itself = slots == slots[:, None]
    is_seen = torch.stack((slots <= slots[:, None], itself))
    order = torch.tensor(MOVED, device=model.device)
    moved_ids = tuple(tuple(row[slot] for slot in MOVED) for row in TOKEN_IDS)
    kept = _run(model, TOKEN_IDS, is_seen, position_ids=slots.repeat(2, 1))
    is_seen = is_seen[:, order][:, :, order]
    moved = _run(model, moved_ids, is_seen, position_ids=order.repeat(2, 1))
    assert kept.output is not None
    assert moved.output is not None
    assert alone.output is not None
    if not _agree(kept.output[:, order], moved.output):
        raise AttentionError(f"{name} hides or weighs tokens by their slots, whatever the mask is")
    sees_others = not _agree(kept.output[0, -1], alone.output[0, -1])
    if not sees_others or not _agree(kept.output[1], alone.output[1]):
        raise AttentionError(f"{name} does not attend under the mask that it is given")


def _alone(model: PreTrainedModel) -> Tensor:
    """Return a mask in which each token sees only itself, ``(B, T, T)``."""
    return torch.eye(len(TOKEN_IDS[0]), dtype=torch.bool, device=model.device).repeat(2, 1, 1)


def _same_tokens(a: _Pass, a_slots: Sequence[int], b: _Pass, b_slots: Sequence[int]) -> bool:
    """Return True if queries, keys and values of some tokens of the first rows agree."""
    return all(
        _agree(one[0, :, list(a_slots)], other[0, :, list(b_slots)])
        for one, other in zip(a.token_tensors(), b.token_tensors(), strict=True)
    )


def _last_tokens_agree(found: _Pass) -> bool:
    pairs = [(t[0, :, -1], t[1, :, -1]) for t in found.token_tensors()]
    if found.output is not None:
        pairs.append((found.output[0, -1], found.output[1, -1]))
    return all(_agree(a, b) for a, b in pairs)


def _agree(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors are equal up to rounding, or NaN comes from the weights."""
    if not a.isfinite().all():
        return True
    allowed = max(TOLERANCE, 4 * torch.finfo(a.dtype).eps) * float(a.abs().max())
    return torch.allclose(a, b, rtol=0.0, atol=allowed)


def _run(
    model: PreTrainedModel,
    token_ids: tuple[tuple[int, ...], ...],
    is_seen: Tensor | None = None,
    **options: Any,
) -> _Pass:
    """Run rows of tokens: with attention that returns zeros, or under the mask ``is_seen``.

    Raises:
        AttentionError: If the model's code fails.
    """
    found = _Pass(is_seen)
    input_ids = torch.tensor(token_ids, device=model.device)
    token = _pass.set(found)
    try:
        with torch.no_grad(), _evaluating(model):
            output = model(input_ids=input_ids, use_cache=False, **options)
    except (FlexMaskError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # raised by model code that expects a tensor as mask
        raise AttentionError(
            f"{type(model).__name__} does not run with flexmask's attention: {described(error)}"
        ) from error
    finally:
        _pass.reset(token)
    found.output = getattr(output, "logits", getattr(output, "last_hidden_state", None))
    if is_seen is not None and found.output is None:
        raise AttentionError(
            f"{type(model).__name__} returns neither logits nor hidden states to compare"
        )
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and other training behaviour for the duration."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
