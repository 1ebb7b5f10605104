"""Turns keys to other positions: rotary embeddings applied to the difference of two positions.

A rotary embedding (Su et al., 2021, arXiv:2104.09864) rotates pairs of a key's dimensions by
angles proportional to its position. So a key computed at one position becomes that of another
position by a rotation by the difference, whatever made the frequencies (linear, Llama 3 and YaRN
scaling among others). A factor on cosines and sines, as in YaRN, stays as it is.

`key_turns` relies on no name of a class. Frequencies are taken from the model's buffers, and each
is tried with every way to pair dimensions, until one turns the queries and keys that an attention
module really computes into those that it computes at other positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexmask.attention.model_probe import (
    TOLERANCE,
    AttentionCall,
    ModelProbe,
    attention_calls,
    rotations,
)

TOKEN_IDS = (3, 4, 5, 6)
FREQUENCIES = "inv_freq"
"""The end of the names by which transformers' models register their frequencies as buffers."""


@dataclass(frozen=True, eq=False)
class KeyTurn:
    """The rotation of an attention module's keys from their positions to others.

    Attributes:
        frequencies: ``(P,)`` float32, radians per position of each pair of dimensions; empty if
            the keys do not depend on positions.
        first_dim: The first of the ``2 * P`` dimensions that rotate; the others stay.
        has_neighbours: Whether dimensions ``2 * i`` and ``2 * i + 1`` form a pair; if not,
            ``i`` and ``P + i`` do.
    """

    frequencies: Tensor
    first_dim: int = 0
    has_neighbours: bool = False

    @property
    def num_dims(self) -> int:
        """Fewest dimensions of a key that can be turned."""
        return self.first_dim + 2 * self.frequencies.numel()

    def angles(self, old_positions: Tensor, new_positions: Tensor) -> Tensor:
        """Return the angles by which keys of ``N`` tokens turn.

        They are differences of the angles that the model computes, which it rounds to float32: at
        position 100,000 by up to 0.004 radians.

        Args:
            old_positions: ``(N,)`` positions at which the keys were computed.
            new_positions: ``(N,)`` positions at which they are used.

        Returns:
            ``(N, P)`` float32.
        """
        new, old = (
            (positions.float()[:, None] * self.frequencies.to(positions.device)).double()
            for positions in (new_positions, old_positions)
        )
        return (new - old).remainder(2 * torch.pi).float()

    def turn(self, keys: Tensor, angles: Tensor) -> Tensor:
        """Return keys turned by the angles that `angles` returned; computed in float32.

        Args:
            keys: ``(..., N, D)``, as attention sees them: rotated to their positions.
            angles: ``(N, P)``.

        Returns:
            A tensor of the shape and dtype of ``keys``; ``keys`` itself if no dimension rotates.
        """
        if not self.frequencies.numel():
            return keys
        x, y = self._pairs(keys).float().unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        turned = keys.clone()
        self._pairs(turned).copy_(torch.stack((x * cos - y * sin, y * cos + x * sin), -1))
        return turned

    def largest(self, heads: Tensor) -> Tensor:
        """Return the largest magnitude of each dimension, or of the pair that it rotates in.

        Args:
            heads: ``(..., D)``.

        Returns:
            ``(D,)``.
        """
        largest = heads.abs().flatten(0, -2).amax(0)
        if self.frequencies.numel():
            pairs = self._pairs(largest)
            pairs.copy_(pairs.amax(-1, keepdim=True).expand_as(pairs).clone())
        return largest

    def _pairs(self, keys: Tensor) -> Tensor:
        """View the dimensions that rotate as pairs, ``(..., P, 2)``."""
        count = self.frequencies.numel()
        sizes = (count, 2) if self.has_neighbours else (2, count)
        rotating = keys.narrow(-1, self.first_dim, 2 * count)
        pairs = rotating.view(*keys.shape[:-1], *sizes)
        return pairs if self.has_neighbours else pairs.transpose(-1, -2)


@dataclass(frozen=True)
class KeyTurns:
    """How the keys of a model are turned to other positions; `key_turns` makes it.

    Attributes:
        by_module: The turn of each attention module; modules with equal ones share one object.
            Empty if there is a ``reason``.
        reason: Why a span of this model is reused only at its own positions; None if it is reused
            at any.
    """

    by_module: Mapping[nn.Module, KeyTurn]
    reason: str | None = None


def key_turns(probe: ModelProbe) -> KeyTurns:
    """Find how a model's keys are turned, and prove it with queries and keys that it computes.

    The same tokens run at two sets of positions, up to the last one of the model's context, with
    attention that returns zeros. Turned queries and keys must be those of the other positions, and
    values must not depend on them; then scores depend on differences of positions alone.

    Args:
        probe: The probe of a model that attends through flexmask.

    Returns:
        The turns of all attention modules, or the reason why there are none.
    """
    name = type(probe.model).__name__
    reason = _reason_without_trial(probe)
    if reason is not None:
        return KeyTurns({}, f"{name} {reason}")
    last = (probe.context or 4096) - 1
    positions = ((0, 1, last // 3, last), (last, last // 2, 0, max(last - 1, 0)))
    calls = attention_calls(probe.model, (TOKEN_IDS, TOKEN_IDS), positions)
    known, by_module = [KeyTurn(torch.zeros(0))], dict[nn.Module, KeyTurn]()
    old, new = torch.tensor(positions, device=probe.model.device)
    for call in calls:
        _, key, value = call.tensors
        if not key.isfinite().all() or not key.any():
            return KeyTurns({}, f"{name} computes keys of zeros or NaN, which prove nothing")
        if not _agree(value[0], value[1], value.abs().max()):
            return KeyTurns({}, f"the values of {name} depend on positions")
        trials = (*known, *_candidates(probe.model, key.shape[-1]))
        found = next((trial for trial in trials if _fits(trial, call, old, new)), None)
        if found is None:
            return KeyTurns(
                {}, f"no rotary embedding of {name} turns its queries and keys to other positions"
            )
        if found not in known:
            known.append(found)
        by_module[call.module] = found
    return KeyTurns(by_module)


def _reason_without_trial(probe: ModelProbe) -> str | None:
    config = probe.model.config.get_text_config()
    if probe.has_own_scores:
        return "masks scores in code of its own"
    if probe.rotation_limit is not None:
        return "has rotary embeddings whose frequencies depend on the length of a row"
    if any(rotation.get("mrope_section") for rotation in rotations(config)):
        return "has rotary embeddings of several positions for each token"
    return None


def _candidates(model: PreTrainedModel, head_dim: int) -> Iterator[KeyTurn]:
    """Generate the turns of heads of ``head_dim`` that the buffers of a model allow."""
    for name, buffer in model.named_buffers():
        count = buffer.numel()
        if not name.endswith(FREQUENCIES) or not 0 < 2 * count <= head_dim:
            continue
        for frequencies in (buffer.float().flatten(), -buffer.float().flatten()):
            for first_dim in sorted({0, head_dim - 2 * count}):
                for has_neighbours in (False, True):
                    yield KeyTurn(frequencies, first_dim, has_neighbours)


def _fits(turn: KeyTurn, call: AttentionCall, old: Tensor, new: Tensor) -> bool:
    """Return True if a turn makes the queries and keys of the second row of those of the first."""
    query, key, _ = call.tensors
    if key.shape[-1] != query.shape[-1] or turn.num_dims > key.shape[-1]:
        return False
    angles = turn.angles(old.to(key.device), new.to(key.device))
    # Relative to each pair, so that a few large ones do not hide errors in the others.
    return all(
        _agree(turn.turn(heads[0], angles), heads[1], turn.largest(heads))
        for heads in (query, key)
    )


def _agree(a: Tensor, b: Tensor, largest: Tensor) -> bool:
    """Return True if two tensors are equal up to rounding of values of a magnitude."""
    allowed = max(TOLERANCE, 4 * torch.finfo(a.dtype).eps) * largest.float()
    return bool(((a.float() - b.float()).abs() <= allowed).all())
